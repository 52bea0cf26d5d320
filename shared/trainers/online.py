"""OnlineTrainer: prompts are sampled from, rewarded, and trained on in micro-batches, round after round.

What a round's rewards mean for the update is a subclass's: `finish_round`, `micro_batch` and `compute_loss`. An action
is a token or a denoising step: nothing here knows which. The prompt loader is not prepared by accelerate, which would
fetch a batch ahead of the update that it should come after.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from shared.data.rows import Rows
from shared.errors import UserError
from shared.objectives.advantages import weighted_rewards, zero_std_groups
from shared.policies.base import Policy
from shared.policies.prefix import evaluating
from shared.rewards.combine import RewardSet, RewardTable
from shared.runtime.fsdp import reshard
from shared.runtime.report import SampleRow
from shared.trainers.alarms import Alarms
from shared.trainers.answers import evenly_spaced
from shared.trainers.base import AlignTrainer
from shared.trainers.keeping import preserved_randomness
from shared.trainers.online_evaluation import answered, evaluated, keep_samples, print_samples
from shared.trainers.online_loop import Steps, Stream
from shared.trainers.online_sampling import resampled, scored, scored_beside
from shared.trainers.online_state import Place, load_state, save_state
from shared.trainers.pictures import Pictures
from shared.trainers.readying import evaluated_model
from shared.trainers.reward_adapter import AdapterReward
from shared.trainers.rollout import (
    Actor,
    Buffer,
    MicroBatch,
    Prompts,
    Rollout,
    cut,
    in_memory,
    round_shape,
)


class OnlineTrainer(AlignTrainer):
    """Base of the trainers whose data are the model's own samples.

    Args:
        policy: gives log-probabilities of a batch's actions.
        actor: samples, and makes batches of samples; see shared.trainers.rollout.Actor.
        rewards: score the samples.
        train_dataset: rows with prompts, map-style or a stream.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        As AlignTrainer otherwise.

    Raises:
        UserError: numbers that do not divide; see shared.trainers.rollout.round_shape.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        policy: Policy,
        actor: Actor,
        rewards: RewardSet,
        train_dataset: Any,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.policy, self.actor, self.rewards = policy, actor, rewards
        self.rewards_of_answers = rewards.skipping("to the most likely answers, one a prompt")
        self.local_rows, self.together, self.unit = round_shape(args, args.world_size)
        rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        prompts_a_step = rows_a_step / args.num_generations / args.num_iterations
        most = 1 + (args.max_resampling if args.dynamic_sampling else 0)
        drawn = math.ceil((args.max_steps + 1) * prompts_a_step + self.local_rows * args.world_size) * most
        rows = in_memory(train_dataset, drawn if args.max_steps > 0 else None)
        rows = rows if isinstance(rows, Rows) else Rows(rows)
        steps = math.ceil(args.num_train_epochs * len(rows) / prompts_a_step)
        self.steps_in_all = args.max_steps if args.max_steps > 0 else steps
        args.ignore_data_skip = True  # where a run goes on is in its buffer and cursor
        for reward in rewards.rewards:
            if isinstance(reward, AdapterReward):
                reward.join(self, model, args)
        super().__init__(
            model,
            args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=[Steps(self), *([Pictures(self)] if actor.makes_images else []), *(callbacks or [])],
            data_collator=list,
            **kwargs,
        )
        order = {"shuffle": args.shuffle_dataset, "seed": args.data_seed}
        self.prompts = Prompts(rows, **order, check=actor.check, skip=args.on_bad_row == "skip")
        self.random = torch.Generator(args.device).manual_seed(args.seed * 65_537 + args.process_index)
        self.buffer: Buffer | None = None
        self.begun: Place | None = None  # where things were before the micro-batches that are being drawn
        self.drawn_before = 0  # prompts, when the round under way began
        self.first_number = 0  # in the run, of the first sample that is taken next on this process
        self.alarms = Alarms()
        self.step_sums: dict[str, Tensor] = {}
        self._phase = 0  # micro-batches of the current optimizer step that have been drawn
        self._noted: dict[str, list[float]] = defaultdict(list)  # figures of rounds since the last log
        self._seconds: dict[str, float] = defaultdict(float)
        self._actions: dict[str, float] = defaultdict(float)
        self._clock = 0.0
        self._logged = 0
        self.last_epoch = 0.0

    # ---- What a trainer fills in -----------------------------------------------------------------------------------

    def finish_round(self, rollout: Rollout) -> dict[str, float]:
        """Put what follows from a round's rewards into the rollout (advantages, for one); gives figures to log."""
        raise NotImplementedError

    def before_updates(self, buffer: Buffer) -> None:
        """Called once a round is cut into micro-batches, before the first of them is trained on."""

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        """What is trained on for these rows of the buffer's rollout."""
        raise NotImplementedError

    def informative(self, rollout: Rollout) -> Tensor:
        """`(P,)` bool, groups that dynamic sampling keeps: those whose rewards differ."""
        return ~zero_std_groups(rollout.total, self.args.num_generations)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        """Called before the micro-batches of an optimizer step, for what all of them share."""

    def controllers(self) -> dict[str, Any]:
        """Plain numbers that a resumed run needs, besides weights, buffer and random states."""
        return {}

    def load_controllers(self, state: dict[str, Any]) -> None:
        """Take back what `controllers` gave."""

    # ---- The loop --------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Stream:
        """Micro-batches without end; a round is sampled when the last one is spent."""
        return Stream(self)

    def set_initial_training_values(self, args: Any, dataloader: Stream) -> tuple:
        """transformers' figures of a run, which is one epoch to it; the options stay as they were given."""
        args = copy.copy(args)
        args.max_steps = self.steps_in_all
        return super().set_initial_training_values(args, dataloader)

    def next_micro_batch(self) -> MicroBatch:
        """The next micro-batch of the buffer, which is filled first where it is spent."""
        if self.buffer is None or self.buffer.spent:
            rollout = self._round()
            args = self.args
            window = args.gradient_accumulation_steps
            aligned = self._phase == 0 and args.steps_per_generation % window == 0
            parts = cut(rollout.lengths, self.unit, args.per_device_train_batch_size, window if aligned else 1)
            self.buffer = Buffer(rollout, parts, args.num_iterations, born=self.state.global_step)
            with self.timed("log_probs"):
                self.before_updates(self.buffer)
        rows = self.buffer.next()
        return self.micro_batch(self.buffer, rows)

    def get_batch_samples(self, epoch_iterator: Iterator[MicroBatch], num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and what its losses are divided by.

        Sets `self.step_sums`: `rows` and `actions` over all micro-batches and processes, at least 1.
        """
        self.begun, batches = Place.of(self), []
        for self._phase in range(num_batches):
            batches.append(next(epoch_iterator))
        self._phase, self.begun = 0, None
        counts = torch.tensor([batch.counts for batch in batches], dtype=torch.float64).sum(0)
        rows, actions = self.accelerator.reduce(counts.float().to(device), "sum").clamp(min=1)
        self.step_sums = {"rows": rows, "actions": actions}
        self._actions["update"] += float(rows if self.actor.makes_images else actions)
        self._totals["samples"] += float(rows)
        if self.actor.unit == "token":
            self._totals["tokens"] += float(actions)
        self._clock = time.perf_counter()
        self.prepare_step(batches)
        return batches, actions

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return replace(inputs, batch=inputs.batch.to(self.args.device))

    def floating_point_ops(self, inputs: MicroBatch) -> int:
        """Not counted."""
        return 0

    # ---- A round ---------------------------------------------------------------------------------------------------

    def _round(self) -> Rollout:
        """Sample, reward and finish one round."""
        args, world = self.args, self.args.world_size
        self.drawn_before = self.prompts.cursor
        drawn = self.prompts.draw(self.local_rows * world // args.num_generations)
        first = args.process_index * self.local_rows
        mine = [drawn[at // args.num_generations] for at in range(first, first + self.local_rows, self.together)]
        self.first_number = self.drawn_before * args.num_generations + first
        rollout = self.sampled(mine)
        if args.dynamic_sampling:
            rollout = resampled(self, rollout)
        figures = self.finish_round(rollout)
        for name, value in figures.items():
            self._noted[name].append(value)
        keep_samples(self, rollout)
        return rollout

    def sampled(self, indices: list[int], group_size: int | None = None) -> Rollout:
        """Samples of the prompts at these indices, with their rewards."""
        rows = self.prompts.at(indices)
        self.row_notes.update(self.prompts.notes)
        size = group_size or self.together
        rollout, table = (scored_beside if self.args.async_reward_computation else scored)(self, rows, size)
        done = rollout.rows if self.actor.makes_images else float(rollout.lengths.sum())
        self._actions["generation"] += done * self.args.world_size  # the others take as many
        rollout.rewards, rollout.extras = table.values, table.extras
        rollout.total = weighted_rewards(table.values, self.rewards.weights)
        self._note(table)
        return rollout

    def _note(self, table: RewardTable) -> None:
        for name, value in table.metrics.items():
            self._noted[name].append(value)
        for name, seconds in zip(table.names, table.seconds, strict=True):
            self._seconds[f"rewards/{name}"] += seconds
            if self.args.on_reward_error != "raise":
                self._noted[f"rewards/{name}/error_ratio"].append(table.errors.get(name, 0) / len(table.values))

    @contextlib.contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """The model as it samples in training."""
        with self.timed("generation"), evaluating(self.model), self._inference(), self.sampling() as model:
            self.actor.refresh(self)
            yield model
            reshard(self.model)

    def sampling(self) -> contextlib.AbstractContextManager[nn.Module]:
        """What takes the samples to train on: to be overridden where that is not the model as it is."""
        return contextlib.nullcontext(self.model)

    def score(self, rollout: Rollout, mode: str = "train") -> RewardTable:
        """The rewards of a rollout's samples. `mode`: as they were sampled, see Actor.act."""
        rewards = self.rewards_of_answers if mode == "greedy" else self.rewards
        return rewards(rollout.samples, trainer_state=self.state, group_size=rollout.group_size, mode=mode)

    def _inference(self):
        """Autocast as in the model's own forward, which an engine may have wrapped elsewhere."""
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """This process's share of the held-out prompts, in order; batches are of completions, whole groups each."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        rows = rows if isinstance(rows, Rows) else Rows(rows)
        share = rows.share(self.args.process_index, self.args.world_size)
        group = self.args.num_generations_eval or self.args.num_generations
        size = max(1, self.args.per_device_eval_batch_size // group)
        return DataLoader(share, batch_size=size, collate_fn=list)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As get_eval_dataloader."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Rewards of samples of held-out prompts: their means, pass@k, lengths; the same samples for equal weights."""
        with evaluated_model(self), preserved_randomness(), evaluating(self.model), self._inference():
            self.actor.refresh(self)
            metrics, count = evaluated(self, dataloader)
            reshard(self.model)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=count)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """By the first held-out set, where there are several and the metric's name says none of them."""
        if isinstance(self.eval_dataset, dict):
            first = f"eval_{next(iter(self.eval_dataset))}_"
            own = {f"eval_{k.removeprefix(first)}": value for k, value in metrics.items() if k.startswith(first)}
            metrics = {**own, **metrics}
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(sorted(name.removeprefix("eval_") for name in metrics))
            raise UserError(
                f"metric_for_best_model {self.args.metric_for_best_model}: an evaluation has no such metric; there "
                f"are: {known}."
            ) from error

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """The most likely answers to evenly spaced held-out prompts, and their rewards."""
        rows = evenly_spaced(self.eval_dataset, self.args.eval_answers)
        if rows is None:
            return None
        with self._inference():
            self.actor.refresh(self)
            return answered(self, rows)

    # ---- Watching --------------------------------------------------------------------------------------------------

    def _means(self) -> dict[str, float]:
        """Means of the rounds' figures since the last log, over all processes."""
        own = {name: sum(values) / len(values) for name, values in self._noted.items() if values}
        everyones = gather_object([own]) if self.args.world_size > 1 else [own]
        names = dict.fromkeys(name for each in everyones for name in each)
        found = {name: [each[name] for each in everyones if name in each] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _logs_next(self) -> bool:
        """Whether the step under way is one that is logged."""
        first = self.args.logging_first_step and self.state.global_step == 0
        return first or (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of the rounds and what the steps' time went to, since the last time."""
        if "loss" in logs:
            means = self._means()
            steps = max(1, self.state.global_step - self._logged)
            self._logged = self.state.global_step
            times = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
            what = "images" if self.actor.makes_images else "tokens"
            rates = {
                f"{what}_per_second/{name}": self._actions[name] / self._seconds[name]
                for name in ("generation", "update")
                if self._seconds.get(name)
            }
            logs = {**logs, **means, **times, **rates}
            self._noted.clear()
            self._seconds.clear()
            self._actions.clear()
        super().log(logs, start_time)
        if "loss" in logs:
            if self.args.log_completions and self.args.should_save and self.buffer is not None:
                print_samples(self, self.buffer.rollout)
            for text in self.alarms.check(self.state.global_step, self.state.log_history[-1]):
                self.report.notes.append(text)
                if self.args.should_log:
                    print(text, flush=True)

    # ---- Going on --------------------------------------------------------------------------------------------------

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        save_state(self, checkpoint)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        load_state(self, checkpoint)
