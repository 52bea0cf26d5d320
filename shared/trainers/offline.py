"""Trainers on recorded data: the loss of a step does not depend on how the step is cut into micro-batches and ranks.

Every loss here is Σ weight · term / denominator, with one denominator for the whole optimizer step over all processes.
Each process gets its own share times the number of processes, since gradients are averaged between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import EvalLoopOutput

from shared.data.rows import Rows
from shared.errors import UserError
from shared.objectives.supervised import supervised_loss
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating
from shared.policies.token import TokenPolicy
from shared.trainers.base import AlignTrainer
from shared.trainers.keeping import preserved_randomness
from shared.trainers.readying import evaluated_model
from shared.trainers.sampling import Filled, TrainingOrder


class OfflineTrainer(AlignTrainer):
    """Base of the trainers whose batches come from a data set; gives each step its denominator.

    Attributes:
        read_held_out: held-out rows as a user has them -> rows as the collator takes them.
        batch_class: what the collator gives: GroupedBatch, or a modality's own record with its `rows`, `columns`,
            `notes`, `action_mask`, `seen`, `counted_tokens` and `to`.
        throughput: what `seen` and `rows` count, as the report calls it; None: not told.

    Raises:
        UserError: arguments that older versions of other libraries' trainers take.
    """

    read_held_out: Callable[[Any], Any] = Rows
    batch_class: type = GroupedBatch
    throughput: tuple[str | None, str | None] = ("tokens", "samples")

    def __new__(cls, *args: Any, **kwargs: Any):
        if "tokenizer" in kwargs:
            raise UserError(f"{cls.__name__} takes no tokenizer: the argument is called processing_class.")
        return super().__new__(cls)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and how many tokens they count over all processes.

        Sets `self.step`: the sums of `step_counts` over all micro-batches and processes, at least 1.
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        if not isinstance(batches[0], self.batch_class):
            raise UserError(
                f"data_collator gave a {type(batches[0]).__name__}; this trainer takes a {self.batch_class.__name__}. "
                "Leave data_collator out: the trainer's own makes batches as its model takes them."
            )
        for batch in batches:
            self.row_notes.update(batch.notes)
        batches = self.rewritten(batches)
        counts = [{"seen": batch.seen(), **self.step_counts(batch)} for batch in batches]
        names = list(counts[0])
        sums = torch.stack([torch.stack([torch.as_tensor(c[name]) for name in names]) for c in counts]).sum(0)
        rows = torch.as_tensor(sum(map(_samples, batches)), dtype=sums.dtype, device=sums.device)[None]
        *totals, samples = self.accelerator.reduce(torch.cat([sums, rows]).to(device), "sum")
        seen = dict(zip(names, totals, strict=True))
        self._seen = getattr(self, "_seen", 0) + torch.stack([seen.pop("seen"), samples])
        self.step = {name: total.clamp(min=1) for name, total in seen.items()}
        self.prepare_step(batches)
        return batches, self.step["counted"]

    def rewritten(self, batches: list[GroupedBatch]) -> list[GroupedBatch]:
        """The micro-batches of a step as they are trained on: as they were read, unless a trainer writes answers."""
        return batches

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        """What the losses are divided by, as scalars: their sums over the whole optimizer step are `self.step`."""
        return {"counted": batch.counted_tokens()}

    def logs_this_step(self) -> bool:
        """For what costs a pass over the vocabulary, such as the entropy: it is taken at the steps that are logged."""
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0

    def prepare_step(self, batches: list[GroupedBatch]) -> None:
        """Called before the micro-batches of an optimizer step, for what all of them share."""

    def _write_report(self, status: str) -> None:
        if hasattr(self, "_seen"):
            self._totals |= dict(zip(self.throughput, self._seen.tolist(), strict=True))
        super()._write_report(status)

    def get_train_dataloader(self) -> DataLoader:
        """transformers' loader; with several processes the last step is filled up with marked rows."""
        rows = self.train_dataset
        if self.args.world_size == 1 or not hasattr(rows, "__len__") or self.args.dataloader_drop_last:
            return super().get_train_dataloader()
        self.train_dataset = Filled(rows, self.args.train_batch_size * self.args.world_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(rows, "__len__"):
            return None
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        strategy = str(getattr(self.args.train_sampling_strategy, "value", self.args.train_sampling_strategy))
        return TrainingOrder(rows, strategy, batch_size=size, seed=self.args.data_seed)

    def _prepare_inputs(self, inputs: GroupedBatch) -> GroupedBatch:
        return inputs.to(self.args.device, non_blocking=True)

    def floating_point_ops(self, inputs: GroupedBatch) -> int:
        """Not counted: transformers' estimate knows nothing of images."""
        return 0

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """This process's share of the held-out rows, in order."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if not hasattr(rows, "share"):
            rows = self.read_held_out(rows)
        return DataLoader(
            rows.share(self.args.process_index, self.args.world_size),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """As get_eval_dataloader: `predict` gives the metrics of these rows, and no predictions."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics of the held-out rows, exact over batches and processes: sums are added up, then divided once."""
        sums: dict[str, float] = {}
        with evaluated_model(self) as model, preserved_randomness(), evaluating(model):
            for batch in dataloader:
                for name, value in self.evaluation_sums(model, self._prepare_inputs(batch)).items():
                    sums[name] = sums.get(name, 0.0) + value.item()
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        names = sorted(sums)
        if self.args.world_size > 1:
            values = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.args.device)
            sums = dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        metrics = self.evaluation_metrics(sums)
        count = int(len(dataloader.dataset.rows)) if hasattr(dataloader.dataset, "rows") else len(dataloader.dataset)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=count)

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        """Sums over one batch's rows, to be added over batches and processes."""
        raise NotImplementedError

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from the sums of all rows; one of them is `loss`."""
        raise NotImplementedError


def _samples(batch: GroupedBatch) -> int | Tensor:
    """The rows of a batch, or the documents of which packing made them."""
    document = batch.columns.get("document")
    return batch.rows if document is None else (document.amax(1) + 1).sum()


class SupervisedTrainer(OfflineTrainer):
    """Supervised fine-tuning of a token policy: −log p of the counted tokens, or its DFT variant.

    Args:
        policy: the token policy around `model`.
        As OfflineTrainer otherwise. `args.loss_type` names the objective.
    """

    def __init__(self, model: nn.Module, args: Any, *, policy: TokenPolicy, **kwargs: Any):
        self.policy = policy
        self.objective = supervised_loss(args.loss_type)
        super().__init__(model, args, **kwargs)
        self.report.units = {"loss": "nats per token", "entropy": "nats per token"}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss per counted token, times the number of processes."""
        weight = self.args.world_size / self.step["counted"]
        loss, stats = self.policy.action_objective(
            model, inputs, lambda logp, at: self.objective(logp) * weight, entropy=self.logs_this_step()
        )
        self.record("mean_token_accuracy", stats.correct.sum(), stats.correct.numel())
        if stats.entropy is not None:
            self.record("entropy", stats.entropy.sum(), stats.entropy.numel())
        return (loss, stats) if return_outputs else loss

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        _, stats = self.policy.action_objective(model, batch, lambda logp, at: self.objective(logp), entropy=True)
        logp = stats.logp.float()
        return {
            "loss": self.objective(logp).sum(),
            "nll": -logp.sum(),
            "correct": stats.correct.sum(),
            "entropy": stats.entropy.sum(),
            "tokens": torch.tensor(logp.numel(), device=logp.device),
        }

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss": sums["loss"] / tokens,
            "perplexity": math.exp(min(sums["nll"] / tokens, 80.0)),
            "mean_token_accuracy": sums["correct"] / tokens,
            "entropy": sums["entropy"] / tokens,
        }
