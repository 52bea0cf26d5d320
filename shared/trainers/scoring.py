"""Trainers of models that score: rewards learnt from preference pairs, and the steps of a solution judged one by one.

What the rows are and how they become batches is the modality's part; here are losses, metrics, and the held-out rows
scored before and after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.data.rows import ROW
from shared.errors import UserError
from shared.objectives.reward_modeling import pair_reward_loss, step_loss
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating
from shared.policies.score import ScorePolicy
from shared.runtime.report import SampleRow
from shared.trainers.answers import SAMPLES_SHOWN, first_set
from shared.trainers.config import AlignConfig
from shared.trainers.offline import OfflineTrainer
from shared.trainers.readying import evaluated_model
from shared.trainers.scoring_options import PairRewardOptions


@dataclass
class PairRewardConfig(PairRewardOptions, AlignConfig):
    """AlignConfig of the trainers of reward models."""

    def _check_options(self) -> None:
        super()._check_options()
        if (self.center_rewards_coefficient or 0.0) < 0:
            raise UserError(f"center_rewards_coefficient {self.center_rewards_coefficient}: must be at least 0.")


class ScoringTrainer(OfflineTrainer):
    """Base of the trainers here; scores all held-out rows before and after training.

    Args:
        policy: the score policy around `model`.
        As OfflineTrainer otherwise. `args.eval_answers` says how many rows the report shows; 0: none are scored.
    """

    told: ClassVar[tuple[str, ...]] = ("accuracy", "loss")  # of the metrics: what is told before and after

    def __init__(self, model: nn.Module, args: Any, *, policy: ScorePolicy, **kwargs: Any):
        self.policy = policy
        super().__init__(model, args, **kwargs)

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """The metrics of all held-out rows (of the first set where there are several), and some rows' scores."""
        rows = first_set(self.eval_dataset)
        if rows is None or not self.args.eval_answers:
            return None
        found = self.evaluation_loop(self.get_eval_dataloader(rows), "Scoring").metrics
        metrics = {name: found[f"eval_{name}"] for name in self.told}
        count = min(self.args.eval_answers, SAMPLES_SHOWN, len(rows))
        shown = [rows[at * len(rows) // count] for at in range(count)]
        size = self.args.per_device_eval_batch_size
        samples: list[SampleRow] = []
        # every process scores these few, so that nothing has to be gathered
        with evaluated_model(self) as model, evaluating(model):
            for start in range(0, count, size):
                part = shown[start : start + size]
                samples += self.scored_samples(model, part, self._prepare_inputs(self.data_collator(part)))
        return metrics, samples

    def scored_samples(self, model: nn.Module, rows: Sequence[dict[str, Any]], batch: GroupedBatch) -> list[SampleRow]:
        """Rows as the report shows them, with their scores under `after`."""
        raise NotImplementedError


class PairRewardTrainer(ScoringTrainer):
    """Bradley-Terry reward modelling: the chosen completion of a pair is to score higher than the rejected one.

    Args:
        As ScoringTrainer. Batches have `group_size` 2, and where the rows have a margin `columns["margin"]`.
        `args.center_rewards_coefficient` weighs (r_w + r_l)².
    """

    told = ("accuracy", "margin", "loss")

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any):
        self._extremes: list[Tensor] = []
        super().__init__(model, args, **kwargs)

    def describe(self, row: dict[str, Any]) -> tuple[str, str, str]:
        """Prompt, chosen and rejected completion of a row as text."""
        raise NotImplementedError

    def pictures(self, row: dict[str, Any]) -> list[Any]:
        """The images of a row, as the report shows them."""
        return []

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        return {**super().step_counts(batch), "pairs": _counted(batch).sum()}

    def pair_losses(self, model: nn.Module, batch: GroupedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, rewards of the chosen and of the rejected completions of the counted pairs, all `(P,)`."""
        counted = _counted(batch)
        rewards = self.policy.rewards(model, batch)
        chosen, rejected = rewards[0::2][counted], rewards[1::2][counted]
        margin = batch.columns.get("margin")
        losses = pair_reward_loss(
            chosen,
            rejected,
            margin_P=None if margin is None else margin[counted],
            center_coefficient=self.args.center_rewards_coefficient or 0.0,
        )
        return losses, chosen, rejected

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss per pair, times the number of processes."""
        losses, chosen, rejected = self.pair_losses(model, inputs)
        rewards = torch.cat([chosen, rejected]).detach()
        self.record("accuracy", (chosen > rejected).sum(), len(chosen))
        self.record("margin", (chosen - rejected).sum(), len(chosen))
        self.record("mean_reward", rewards.sum(), len(rewards))
        self.record("min_reward", rewards.min(), 1)
        self.record("max_reward", rewards.max(), 1)
        loss = losses.sum() * (self.args.world_size / self.step["pairs"])
        return (loss, {"chosen": chosen, "rejected": rejected}) if return_outputs else loss

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        losses, chosen, rejected = self.pair_losses(model, batch)
        if len(chosen):
            rewards = torch.cat([chosen, rejected])
            self._extremes.append(torch.stack([rewards.min(), rewards.max()]))
        return {
            "loss": losses.sum(),
            "correct": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "rewards": (chosen + rejected).sum(),
            "pairs": torch.tensor(len(chosen)),
        }

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        pairs = max(sums["pairs"], 1.0)
        nothing = torch.tensor([torch.inf, -torch.inf], device=self.args.device)
        seen = torch.stack([nothing, *self._extremes])
        self._extremes = []
        ends = self.accelerator.gather(torch.stack([seen[:, 0].min(), seen[:, 1].max()])).view(-1, 2)
        return {
            "loss": sums["loss"] / pairs,
            "accuracy": sums["correct"] / pairs,
            "margin": sums["margin"] / pairs,
            "mean_reward": sums["rewards"] / (2 * pairs),
            "min_reward": ends[:, 0].min().item(),
            "max_reward": ends[:, 1].max().item(),
        }

    def scored_samples(self, model: nn.Module, rows: Sequence[dict[str, Any]], batch: GroupedBatch) -> list[SampleRow]:
        rewards = self.policy.rewards(model, batch).tolist()
        rows = [row for row in rows if not batch.notes.get(row.get(ROW), "").startswith("left out")]
        samples = []
        for row, better, worse in zip(rows, *(rewards[at : 2 * len(rows) : 2] for at in range(2)), strict=True):
            prompt, chosen, rejected = self.describe(row)
            verdict = "right" if better > worse else "wrong"
            scores = f"{verdict}: chosen {better:+.3f}, rejected {worse:+.3f}"
            answers = {"chosen": chosen, "rejected": rejected}
            samples.append(SampleRow(self.pictures(row), prompt, "", after=scores, columns=answers))
        return samples


class StepRewardTrainer(ScoringTrainer):
    """Process reward modelling: right or wrong, said at the end of each step of a solution.

    Args:
        As ScoringTrainer. The completion mask is 1 at the last token of each labelled step, and
        `columns["step_labels"]` `(B, T)` has its label. `args.train_on_last_step_only` leaves the other steps out of
        training, not out of an evaluation.
    """

    told = ("accuracy", "last_step_accuracy", "error_f1", "loss")

    def describe(self, row: dict[str, Any]) -> tuple[str, list[bool]]:
        """A row's prompt and steps as text, and the steps' labels."""
        raise NotImplementedError

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        return {"counted": self._learnt(batch).counted_tokens()}

    def _learnt(self, batch: GroupedBatch) -> GroupedBatch:
        if not self.args.train_on_last_step_only:
            return batch
        return replace(batch, completion_mask=batch.completion_mask * _is_last(batch.completion_mask))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss per labelled step, times the number of processes."""
        logits, labels, last = self._steps(model, self._learnt(inputs))
        right = logits.detach().argmax(1) == labels
        self.record("accuracy", right.sum(), len(right))
        self.record("last_step_accuracy", right[last].sum(), last.sum())
        loss = step_loss(logits, labels).sum() * (self.args.world_size / self.step["counted"])
        return (loss, {"logits": logits, "labels": labels}) if return_outputs else loss

    def _steps(self, model: nn.Module, batch: GroupedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(N, 2)` and labels `(N,)` of the counted steps, and `(N,)` whether a step is its row's last one."""
        counted = batch.completion_mask.bool()
        logits = self.policy.class_scores(model, batch)
        return logits, batch.columns["step_labels"][counted], _is_last(batch.completion_mask)[counted]

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        logits, labels, last = self._steps(model, batch)
        said = logits.argmax(1)
        right = said == labels
        return {
            "loss": step_loss(logits, labels).sum(),
            "correct": right.sum(),
            "steps": torch.tensor(len(labels)),
            "last_correct": right[last].sum(),
            "rows": last.sum(),
            "errors_found": ((said == 0) & (labels == 0)).sum(),
            "errors": (labels == 0).sum(),
            "errors_said": (said == 0).sum(),
        }

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        steps = max(sums["steps"], 1.0)
        return {
            "loss": sums["loss"] / steps,
            "accuracy": sums["correct"] / steps,
            "last_step_accuracy": sums["last_correct"] / max(sums["rows"], 1.0),
            "error_f1": 2 * sums["errors_found"] / max(sums["errors"] + sums["errors_said"], 1.0),
        }

    def scored_samples(self, model: nn.Module, rows: Sequence[dict[str, Any]], batch: GroupedBatch) -> list[SampleRow]:
        shares = self.policy.class_scores(model, batch).softmax(1)[:, 1].tolist()
        samples, at = [], 0
        for row in rows:
            text, labels = self.describe(row)
            chances = shares[at : at + len(labels)]
            at += len(labels)
            samples.append(
                SampleRow(
                    [],
                    text,
                    "",
                    after=" ".join(f"{chance:.2f}" for chance in chances),
                    columns={"steps": " ".join("right" if label else "wrong" for label in labels)},
                )
            )
        return samples


def _counted(batch: GroupedBatch) -> Tensor:
    """`(P,)` bool: the pairs that are no filling of a process's share."""
    counted = batch.columns.get("counted")
    return torch.ones(batch.rows // 2, dtype=torch.bool) if counted is None else counted


def _is_last(mask: Tensor) -> Tensor:
    """`(B, T)` bool: the last place of each row where the mask is 1."""
    mask = mask.long()
    return (mask == 1) & (mask.flip(1).cumsum(1).flip(1) == 1)
