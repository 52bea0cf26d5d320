"""AlignTrainer: what every trainer of the suite adds to transformers.Trainer.

Complete checkpoints, stopping on a signal, the run report, randomness that differs between processes, metrics averaged
over steps and processes, learning rates by module. It does not know what a batch or an objective is.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback

from shared.errors import UserError
from shared.policies.prefix import evaluating
from shared.runtime import checkpoint as checkpoints
from shared.runtime.fsdp import reshard, unused_parameters_allowed
from shared.runtime.launch import check_engine
from shared.runtime.models import parameter_report, precision_report, without_progress_bars
from shared.runtime.report import RunReport, SampleRow, before_after_table, peak_memory, plain
from shared.trainers.config import AlignConfig
from shared.trainers.keeping import preserved_randomness, restore_weights
from shared.trainers.progress import ProgressBar
from shared.trainers.watch import Watch

NOTES_LISTED = 20


class AlignTrainer(Trainer):
    """Base of the trainers. Losses are given to the optimizer as they come: scaling is done in one place, there.

    Args:
        As transformers.Trainer. `args.output_dir` must not hold another run.

    Raises:
        UserError: the output folder holds another run, or there is nothing to resume from.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, model: nn.Module, args: AlignConfig, *, callbacks: list[TrainerCallback] | None = None, **kwargs: Any
    ):
        try:
            super().__init__(model=model, args=args, callbacks=[Watch(self), *(callbacks or [])], **kwargs)
        except ValueError as error:  # options that do not go together, in transformers' words
            raise UserError(str(error)) from error
        check_engine(self.accelerator.distributed_type.value)
        if self.is_fsdp_enabled:
            self._name_sharded_layers()
        self.model_accepts_loss_kwargs = False
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        # transformers seeds every process alike; each must draw its own noise and samples
        set_seed(args.seed, device_specific=True)
        self.run_options: str | None = None  # YAML of the command line's options, where there was one
        self.report = RunReport(Path(args.output_dir) / "report", title=self.title(), config={})
        self.interruption = checkpoints.Interruption()
        self.row_notes: dict[int, str] = {}  # training rows that were not used, or not whole
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._totals: dict[str, float] = defaultdict(float)
        self._train_seconds = 0.0
        self._opened = False
        self._resume: Path | None = None

    # ---- What a trainer may fill in --------------------------------------------------------------------------------

    def title(self) -> str:
        """The report's title."""
        return type(self).__name__

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """Held-out rows answered by the model as it is now: metrics, and samples with `after` filled in."""
        return None

    def learning_rates(self) -> dict[str, float]:
        """Learning rates by parameter name, for parameters that do not take `args.learning_rate`."""
        return {}

    def save_extras(self, checkpoint: Path) -> None:
        """Write what a resumed run needs beyond transformers' own state; called on every process."""

    def load_extras(self, checkpoint: Path) -> None:
        """Read it back, once model and optimizer are."""

    def _name_sharded_layers(self) -> None:
        """Shard by the layers that the model has: its class may name others, which accelerate would look for."""
        plugin = self.accelerator.state.fsdp_plugin
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if plugin.transformer_cls_names_to_wrap is None:
            present = {type(module).__name__ for module in inner.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(inner._no_split_modules or ()))

    # ---- Running ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, and write the run report; stop after the current step on SIGINT or SIGTERM.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one in `args.output_dir`;
                `args.resume_from_checkpoint` where None.

        Raises:
            UserError: the folder holds another run, or no complete checkpoint to resume from.
            KeyboardInterrupt, SystemExit: after a signal, once the checkpoint and the report are written.
        """
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume = checkpoints.resume_path(asked, self.args.output_dir)
        overwrite = self.args.overwrite_output_dir or self._opened
        checkpoints.check_output_dir(self.args.output_dir, resuming=resume is not None, overwrite=overwrite)
        self._opened, self._resume = False, resume
        if resume is not None and 0 < self.args.max_steps <= (done := checkpoints.step_of(resume)):
            raise UserError(
                f"{resume}: the run is at step {done} of {self.args.max_steps}. To go on raise --max_steps."
            )
        if self.eval_dataset is None and self.args.eval_answers and self.args.should_save:
            print("No held-out rows: nothing is answered before and after training. --eval_fraction holds some out.")
        with self.interruption:
            try:
                started = time.perf_counter()
                output = super().train(resume_from_checkpoint=str(resume) if resume else None, **kwargs)
                if self.state.global_step == 0:
                    raise UserError("No step was trained: there are fewer rows than a batch takes.")
                self._train_seconds = time.perf_counter() - started - self._totals["answer_seconds"]
                if not self._agreed_signal():
                    self._answers_after()
                    self._agreed_signal()
                self._gather_row_notes()
            except BaseException as error:
                self._save_what_is_done(error)
                self._write_report("failed")
                raise
        self._write_report("interrupted" if self.interruption.received else "finished")
        self._leave_if_interrupted()
        return output

    def _agreed_signal(self) -> int | None:
        """The signal that any process has got: all must go on, or end, in the same way."""
        if self.args.world_size > 1:
            received = torch.tensor(self.interruption.received or 0, device=self.args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.interruption.received = int(received.item()) or None
        return self.interruption.received

    def _open_run(self) -> None:
        """Called when model and optimizer are ready: a run that cannot start leaves the folder as it was."""
        args: AlignConfig = self.args
        self._opened = True
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if self._resume is None:
                checkpoints.clear_run(args.output_dir)
            options = self.run_options or yaml.safe_dump(plain(args.chosen()), sort_keys=True)
            self._tell_changes(options)
            checkpoints.write_atomically(Path(args.output_dir) / "run.yaml", options)
            self.report.config = {**args.chosen(), **(yaml.safe_load(options) or {})}
            print(precision_report(self.model, self.accelerator.mixed_precision), flush=True)
            print(parameter_report(self.model), flush=True)
        self.accelerator.wait_for_everyone()
        if self._resume is not None:
            self.load_extras(self._resume)
            self.report.recall(self._resume.parent / "report", up_to=self.state.global_step)
            written_by = checkpoints.processes_of(self._resume)
            if written_by not in (None, args.world_size) and args.should_save:
                print(
                    f"The checkpoint was written by {written_by} process(es), {args.world_size} go on with it: "
                    "the rest of the run will not be the same number for number."
                )

    def _tell_changes(self, options: str) -> None:
        """Say from where a resumed run goes on, and which of its options are not what they were."""
        if self._resume is None:
            return
        print(f"Going on from {self._resume} (step {self.state.global_step}).", flush=True)
        earlier = Path(self.args.output_dir) / "run.yaml"
        before = yaml.safe_load(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
        now = yaml.safe_load(options) or {}
        for name in sorted(set(before) | set(now)) if before else []:
            if before.get(name) != now.get(name) and name != "output_dir":
                print(f"  {name} was {before.get(name)!r}, is {now.get(name)!r}", flush=True)

    def _answers_before(self) -> None:
        """Called once the model is prepared: engines that shard it cannot run it earlier."""
        if self.report.before or self.state.global_step > 0:
            return
        if (answered := self._timed_answers()) is not None:
            self.report.before, samples = answered
            self.report.samples = [sample.as_before() for sample in samples]
            self._write_report("running")

    def _answers_after(self) -> None:
        if (answered := self._timed_answers()) is None:
            return
        self.report.after, samples = answered
        earlier = {(sample.question, at): sample for at, sample in enumerate(self.report.samples)}
        self.report.samples = [
            sample.since(earlier[key]) if (key := (sample.question, at)) in earlier else sample
            for at, sample in enumerate(samples)
        ]

    def _timed_answers(self):
        started = time.perf_counter()
        with preserved_randomness(), evaluating(self.model):
            answered = self.answer_questions()
            reshard(self.model)
        self._totals["answer_seconds"] += time.perf_counter() - started
        return answered

    def _gather_row_notes(self) -> None:
        if self.args.world_size > 1:
            notes = gather_object([self.row_notes])
            self.row_notes = {row: note for each in notes for row, note in each.items()}
        if self.row_notes:
            listed = [f"row {row}: {note}" for row, note in sorted(self.row_notes.items())]
            more = f"; and {len(listed) - NOTES_LISTED:,} more" if len(listed) > NOTES_LISTED else ""
            shown = "; ".join(listed[:NOTES_LISTED])
            text = f"{len(listed):,} training rows were not used, or not whole: {shown}{more}"
            self.report.notes.append(text)
            if self.args.should_save:
                print(text, flush=True)

    def _write_report(self, status: str) -> None:
        if not self.args.should_save or not self._opened:
            return
        report = self.report
        report.status = status
        report.add_curves(self.state.log_history)
        if self._train_seconds:
            report.throughput = {"train_seconds": self._train_seconds} | {
                f"{name}_per_second": total / self._train_seconds
                for name, total in self._totals.items()
                if name in ("samples", "tokens", "images")
            }
        report.peak_memory = peak_memory()
        if status == "interrupted":
            report.notes.append(f"Interrupted at step {self.state.global_step}. {self._how_to_resume()}")
        page = report.write()
        if status == "finished":
            if report.after:
                print(before_after_table(report.before, report.after), flush=True)
            print(f"Run report: {page}", flush=True)

    def _how_to_resume(self) -> str:
        return f"Go on with: --output_dir {self.args.output_dir} --resume_from_checkpoint true (run.yaml has the rest)"

    def _save_what_is_done(self, error: BaseException) -> None:
        """A row that cannot be used, or a reward that fails, in mid-training, costs no finished step.

        Not with several processes: the others are at work on a step that this one will never join.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()
        before = 0 if self._resume is None else checkpoints.step_of(self._resume)
        if isinstance(error, UserError) and self.args.world_size == 1 and self.state.global_step > before:
            self._save_checkpoint(self.model_wrapped, None)
            print(f"Saved at step {self.state.global_step}. {self._how_to_resume()}", flush=True)

    def _leave_if_interrupted(self) -> None:
        if not self.interruption.received:
            return
        if self.args.should_save:
            print(f"Stopped at step {self.state.global_step}, saved. {self._how_to_resume()}", flush=True)
        if self.interruption.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.interruption.received)

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.discard(path)  # left there by a run that was killed, or that went on from an earlier one
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go when this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.save_extras(path)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark_complete(path, step=self.state.global_step, processes=self.args.world_size)
            best = self.state.best_model_checkpoint
            checkpoints.rotate(self.args.output_dir, keep=limit, spared=[path, *([best] if best else [])])
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not self.is_fsdp_enabled:
            restore_weights(model, resume_from_checkpoint)
            return
        if hasattr(model, "peft_config") and not (Path(resume_from_checkpoint) / "adapter_config.json").is_file():
            raise UserError(f"{resume_from_checkpoint} holds a whole model and no adapter: leave the adapter out.")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with unused_parameters_allowed() if self.is_fsdp_enabled else contextlib.nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            restore_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model (or adapter) and processor as transformers and peft load them; say where.

        Args:
            output_dir: the folder; `args.output_dir` where None.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            print(f"Saved model: {output_dir or self.args.output_dir}", flush=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_progress_bars():
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs: run.yaml says the same

    # ---- Optimizer -------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimizer, its parameter groups split where a module has a learning rate of its own."""
        try:
            optimizer = super().create_optimizer(model)
        except ImportError as error:
            raise UserError(f"--optim {self.args.optim.value}: {error}") from error
        rates = self.learning_rates()
        if not rates:
            return optimizer
        names = {id(p): name for name, p in (model or self.model).named_parameters()}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            split: dict[float, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                split[rates.get(names.get(id(parameter), ""), group["lr"])].append(parameter)
            groups += [{**group, "params": params, "lr": rate} for rate, params in split.items()]
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    # ---- Metrics ---------------------------------------------------------------------------------------------------

    def record(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add to a metric that is logged as Σ total / Σ count, over the steps and processes since the last log."""
        zero = torch.zeros((), device=total.device, dtype=torch.float32)
        self._sums[name] = self._sums.get(name, zero) + total.detach().float()
        self._counts[name] = self._counts.get(name, zero) + count

    def _drain_metrics(self) -> dict[str, float]:
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([torch.stack([self._sums[n], self._counts[n]]) for n in names])
        stacked = self.accelerator.reduce(stacked, "sum")
        self._sums, self._counts = {}, {}
        return {n: (total / count).item() for n, (total, count) in zip(names, stacked, strict=True) if count > 0}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics recorded since the last time where these are training figures."""
        if "loss" in logs:
            logs = {**logs, **self._drain_metrics()}
        super().log(logs, start_time)
