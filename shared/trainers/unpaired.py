"""Trainers on single answers labelled good or bad: KTO and its kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from shared.objectives.unpaired import kl_estimate, kl_sums, running_mean
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating
from shared.trainers.keeping import preserved_randomness
from shared.trainers.preference import PreferenceTrainer, share_above
from shared.trainers.readying import evaluated_model
from shared.trainers.reference import Cached

LABELS = ("chosen", "rejected")
STATE_FILE = "preference_state.safetensors"


@dataclass
class UnpairedState:
    """What a loss of single answers is given beside their log-ratios.

    Args:
        kl: scalar, KTO's reference point.
        shift: scalar, BCO's δ.
        weights: `(P,)` of bad rows; None: 1.
    """

    kl: Tensor
    shift: Tensor
    weights: Tensor | None = None


class UnpairedTrainer(PreferenceTrainer):
    """Single answers labelled good or bad: KTO and its kin.

    Args:
        objective: `(log-ratios (P,), good (P,) bool, state) -> (P,)` losses.
        uses_kl: whether the objective looks at the reference point: batches then bring the pairs that estimate it.
            It is estimated once for all rows of an optimizer step.
        uses_shift: whether it looks at the running mean of the rewards, of the steps before this one.
        As PreferenceTrainer otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        objective: Callable[[Tensor, Tensor, UnpairedState], Tensor],
        uses_kl: bool = False,
        uses_shift: bool = False,
        **kwargs: Any,
    ):
        self.objective, self.uses_kl, self.uses_shift = objective, uses_kl, uses_shift
        super().__init__(model, args, **kwargs)
        self.report.units = {"loss": "per row", "kl": "nats", "logps/chosen": "nats", "logps/rejected": "nats"}
        self.kl = torch.zeros((), device=args.device)
        # mean and count of the earlier steps' rewards; sum and count of this one's
        self._rewards = torch.zeros(4, dtype=torch.float64, device=args.device)

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        return {"counted": batch.member(0).counted_tokens(), "rows": batch.columns["counted"].sum()}

    def prepare_step(self, batches: list[GroupedBatch]) -> None:
        """The reference point and the shift of the whole step, alike on all processes."""
        if self.uses_shift:
            added = self.accelerator.reduce(self._rewards[2:].clone(), "sum")
            self._rewards[:2] = torch.stack(running_mean(self._rewards[0], self._rewards[1], added[0], added[1]))
            self._rewards[2:] = 0
        if self.uses_kl:
            sums = torch.stack([self._kl_sums(self.model_wrapped, batch) for batch in batches]).sum(0)
            self._estimate_kl(sums)
            self.record("kl", self.kl, 1)

    def _estimate_kl(self, sums: Tensor) -> None:
        """The reference point by the sums of this process; where no row has another to pair with, it stays."""
        sums = self.accelerator.reduce(sums, "sum")
        if sums[1] > 0:
            self.kl = kl_estimate(sums)

    @torch.no_grad()
    def _kl_sums(self, model: nn.Module, batch: GroupedBatch) -> Tensor:
        """What the batch adds to the reference point; leaves the reference of the rows' own answers in its columns."""
        moved = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            reference = self.reference.log_probs(model, moved)  # of both answers, their prompt run once
            policy = self.policy.log_probs(model, moved.member(1))
        batch.columns["ref_logp"] = reference[0::2]
        return kl_sums(policy.logp.sum(1), reference[1::2].sum(1), moved.columns["kl_counted"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss of a row, times the number of processes."""
        losses, sums = self._losses(model, inputs)
        self._record_means(sums)
        self._rewards[2:] += torch.stack([sums["rewards"], sums["rows"]]).double()
        loss = losses.sum() / self.step["rows"] * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def _losses(self, model: nn.Module, batch: GroupedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        own = batch.member(0)
        out = self.policy.log_probs(model, own)
        known = Cached() if "ref_logp" in own.columns else self.reference
        logp, reference = out.logp.sum(1), known.log_probs(model, own).sum(1)
        counted, good = own.columns["counted"], own.columns["label"]
        state = UnpairedState(self.kl, self._rewards[0].float(), own.columns.get("density_ratio"))
        losses = self.objective(logp - reference, good, state) * counted
        return losses, self._sums_of(logp.detach(), reference, counted, good, losses.detach())

    def _sums_of(
        self, logp: Tensor, reference: Tensor, counted: Tensor, good: Tensor, losses: Tensor
    ) -> dict[str, Tensor]:
        rewards = self.args.beta * (logp - reference)
        chosen, rejected = (good & counted).float(), (~good & counted).float()
        level = self._rewards[0].float() if self.uses_shift else self.kl * self.args.beta
        above = share_above(rewards - level)
        return {
            "loss": losses.sum(),
            "rewards": (rewards * counted).sum(),
            "rewards/chosen": (rewards * chosen).sum(),
            "rewards/rejected": (rewards * rejected).sum(),
            "rewards/accuracies": (above * chosen + (1 - above) * rejected).sum(),
            "logps/chosen": (logp * chosen).sum(),
            "logps/rejected": (logp * rejected).sum(),
            "rows": counted.sum().float(),
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
        }

    @property
    def means(self) -> dict[str, tuple[str, str]]:
        by_label = {f"{name}/{of}": (f"{name}/{of}", of) for name in ("rewards", "logps") for of in LABELS}
        return {**by_label, "rewards/accuracies": ("rewards/accuracies", "rows")}

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        return self._losses(model, batch)[1]

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As OfflineTrainer; the reference point is estimated first, over all rows."""
        held = self.kl
        if self.uses_kl:
            with evaluated_model(self) as model, preserved_randomness(), evaluating(model):
                sums = [self._kl_sums(model, batch) for batch in dataloader]
            self._estimate_kl(torch.stack(sums).sum(0))
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.kl = held

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = super().evaluation_metrics(sums)
        if {f"rewards/{of}" for of in LABELS} <= set(metrics):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        pending = self.accelerator.reduce(self._rewards[2:].clone(), "sum")
        if self.args.should_save:
            state = {"rewards": torch.cat([self._rewards[:2], pending]).cpu(), "kl": self.kl.cpu()}
            save_file(state, checkpoint / STATE_FILE)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        if (path := checkpoint / STATE_FILE).is_file():
            state = load_file(path)
            self.kl = state["kl"].to(self.args.device)
            self._rewards = state["rewards"].to(self.args.device)
            if self.args.process_index:
                self._rewards[2:] = 0  # the first process brings what all had
