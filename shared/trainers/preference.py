"""Trainers on recorded preferences: pairs of a chosen and a rejected answer, or single answers labelled good or bad.

What a modality brings is its policy and its batches; what an objective brings is a pure function. Nothing here knows
either from the inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.data.rows import Rows
from shared.objectives.pair_losses import PER_TOKEN
from shared.objectives.preference import PairLosses, PairObjective, Pairs, pairs_of, wpo_weights
from shared.objectives.unpaired import kl_estimate, kl_sums, running_mean
from shared.policies.base import GroupedBatch, LogProbs
from shared.policies.token import TokenPolicy
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer, answer, evenly_spaced, sampled
from shared.trainers.judging import Judge, recall, remember, score, win_rate
from shared.trainers.offline import OfflineTrainer
from shared.trainers.reference import Cached, NoReference, Reference

LABELS = ("chosen", "rejected")
STATE_FILE = "preference_state.safetensors"
LEVEL = 1e-4  # rewards no further apart than this are taken for equal
ROWS_SCORED = 512  # held-out rows whose preference is told before and after training


class Asking(Protocol):
    """How a modality asks its model the held-out questions."""

    questions: Rows | dict[str, Rows] | None
    tokenizer: Any

    def encode_prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]: ...

    def prompt(self, row: dict[str, Any]) -> str: ...

    def sample(self, answer: Answer) -> SampleRow: ...


class PreferenceTrainer(OfflineTrainer):
    """What trainers on pairs and on single answers share: the reference, what is told before and after.

    Args:
        policy: the token policy around `model`.
        asking: how held-out prompts are asked, for the judge.
        judge: scores a generated answer; None: nothing is generated.
        ref_model: what `reference_of` is given, once the trainer, and with it the engine, is there.
        As OfflineTrainer otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        policy: TokenPolicy,
        asking: Asking | None = None,
        judge: Judge | None = None,
        ref_model: Any = None,
        **kwargs: Any,
    ):
        self.policy, self.asking, self.judge = policy, asking, judge
        super().__init__(model, args, **kwargs)
        self.reference = self.reference_of(ref_model)

    def reference_of(self, ref_model: Any) -> Reference:
        """The reference of this run. A trainer whose objective has one fills this in."""
        return NoReference()

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """How held-out rows are preferred, and how the judge likes the answers to their prompts."""
        rows = self.eval_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()), None)
        if rows is None or self.args.eval_answers < 1:
            return None
        if len(rows) > ROWS_SCORED and hasattr(rows, "select"):
            rows = rows.select([at * len(rows) // ROWS_SCORED for at in range(ROWS_SCORED)])
        output = self.evaluation_loop(self.get_eval_dataloader(rows), "before and after", metric_key_prefix="held")
        figures = {"preference_accuracy": output.metrics["held_rewards/accuracies"]}
        if self.judge is None or self.asking is None:
            return figures, []
        judged, samples = self._judged()
        return {**figures, **judged}, samples

    def _judged(self) -> tuple[dict[str, float], list[SampleRow]]:
        questions = evenly_spaced(self.asking.questions, self.args.eval_answers)
        if questions is None:
            return {}, []
        answers = answer(self.model, questions, self.asking.encode_prompts, self.asking.tokenizer, self.args)
        prompts = [self.asking.prompt(each.row) for each in answers]
        scores = score(self.judge, prompts, [each.text for each in answers])
        folder = Path(self.args.output_dir) / "report"
        before = recall(folder) if self.state.global_step > 0 else None
        if before is None or len(before) != len(scores):
            before = scores
            if self.args.should_save and self.state.global_step == 0:
                remember(scores, folder)
        shown = {id(each): value for each, value in zip(answers, scores, strict=True)}

        def show(each: Answer) -> SampleRow:
            sample = self.asking.sample(each)
            sample.answer = ""  # a recorded answer is one of many good ones: nothing is right or wrong by it
            sample.columns["judged"] = f"{shown[id(each)]:.2f}"
            return sample

        figures = {"judge_score": sum(scores) / len(scores), "win_rate": win_rate(scores, before)}
        return figures, sampled(answers, show)

    def _record_means(self, sums: dict[str, Tensor]) -> None:
        """Record what `evaluation_metrics` would make of these sums, as metrics of training."""
        for name, (total, count) in self.means.items():
            if total in sums:
                self.record(name, sums[total], sums[count])

    @property
    def means(self) -> dict[str, tuple[str, str]]:
        """Metric -> the sums that it is the quotient of."""
        raise NotImplementedError

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            name: sums[total] / sums[count]
            for name, (total, count) in {"loss": ("loss", "rows"), **self.means}.items()
            if sums.get(count)
        }


class PairedTrainer(PreferenceTrainer):
    """Preference pairs: the DPO family, with or without a reference.

    Args:
        objective: the losses with their weights; see shared.objectives.preference.pair_objective.
        As PreferenceTrainer otherwise. Batches have group_size 2, chosen before rejected.
    """

    def __init__(self, model: nn.Module, args: Any, *, objective: PairObjective, **kwargs: Any):
        self.objective = objective
        super().__init__(model, args, **kwargs)
        self.report.units = {"loss": "per pair", "logps/chosen": "nats", "logps/rejected": "nats"}

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        chosen = batch.member(0).completion_mask.sum()
        return {"counted": batch.counted_tokens(), "chosen_tokens": chosen, "pairs": batch.columns["counted"].sum()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss of a pair, times the number of processes."""
        pairs, out = self.pairs(model, inputs)
        losses = self.objective(pairs)
        self._record_means(_paired_sums(pairs, losses, out))
        loss = losses.total(pairs=self.step["pairs"], tokens=self.step["chosen_tokens"]) * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def pairs(self, model: nn.Module, batch: GroupedBatch) -> tuple[Pairs, LogProbs]:
        """Log-probabilities of the pairs that count, under policy and reference."""
        weighted = self.objective.use_weighting
        out = self.policy.log_probs(model, batch, collision=weighted)
        free = isinstance(self.reference, NoReference)
        pairs = pairs_of(
            out.logp,
            out.mask,
            None if free else self.reference.log_probs(model, batch),
            ld_alpha=getattr(self.args, "ld_alpha", None),
            weights=wpo_weights(out.logp, out.collision, out.mask) if weighted else None,
        )
        return pairs.select(batch.columns["counted"]), out

    @property
    def means(self) -> dict[str, tuple[str, str]]:
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        by_pair = {name: (name, "rows") for name in (*rewards, "logps/chosen", "logps/rejected")}
        losses = self.objective.losses if len(self.objective.losses) > 1 else ()
        terms = {f"loss/{name}": (f"loss/{name}", "chosen_tokens" if name in PER_TOKEN else "rows") for name in losses}
        return {**by_pair, **terms, "mean_token_accuracy": ("correct", "tokens")}

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        pairs, out = self.pairs(model, batch)
        losses = self.objective(pairs)
        return {
            "loss": losses.per_pair.sum(),
            "token_loss": losses.per_token.sum(),
            **_paired_sums(pairs, losses, out),
        }

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = super().evaluation_metrics(sums)
        if sums.get("chosen_tokens"):
            metrics["loss"] += sums["token_loss"] / sums["chosen_tokens"]
        return metrics


def _paired_sums(pairs: Pairs, losses: PairLosses, out: LogProbs) -> dict[str, Tensor]:
    chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": _above(chosen - rejected).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": pairs.chosen.detach().sum(),
        "logps/rejected": pairs.rejected.detach().sum(),
        **{f"loss/{name}": term.sum() for name, term in losses.terms.items()},
        "rows": torch.tensor(pairs.chosen.shape[0], device=chosen.device),
        "chosen_tokens": pairs.chosen_tokens.sum(),
        "correct": _member_sum(out.correct, out.mask, 0),
        "tokens": out.mask[0::2].sum(),
    }


def _above(differences: Tensor) -> Tensor:
    """1 where positive, 0 where negative, ½ where level: before training, policy and reference differ by rounding."""
    return (differences > LEVEL).float() + 0.5 * (differences.abs() <= LEVEL)


def _member_sum(values: Tensor, mask: Tensor, member: int) -> Tensor:
    return (values[member::2] * mask[member::2].bool()).sum()


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
        self._rewards = torch.zeros(
            4, dtype=torch.float64, device=args.device
        )  # mean, count; sum, count not in it yet

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
            self.kl = kl_estimate(self.accelerator.reduce(sums, "sum"))
            self.record("kl", self.kl, 1)

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
        losses, sums = self._losses(model, inputs, self.kl)
        self._record_means(sums)
        self._rewards[2:] += torch.stack([sums["rewards"], sums["rows"]]).double()
        loss = losses.sum() / self.step["rows"] * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def _losses(self, model: nn.Module, batch: GroupedBatch, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = batch.member(0)
        out = self.policy.log_probs(model, own)
        known = Cached() if "ref_logp" in own.columns else self.reference
        logp, reference = out.logp.sum(1), known.log_probs(model, own).sum(1)
        counted, good = own.columns["counted"], own.columns["label"]
        state = UnpairedState(kl, self._rewards[0].float(), own.columns.get("density_ratio"))
        losses = self.objective(logp - reference, good, state) * counted
        return losses, self._sums_of(logp.detach(), reference, counted, good, losses.detach())

    def _sums_of(
        self, logp: Tensor, reference: Tensor, counted: Tensor, good: Tensor, losses: Tensor
    ) -> dict[str, Tensor]:
        rewards = self.args.beta * (logp - reference)
        chosen, rejected = (good & counted).float(), (~good & counted).float()
        level = self._rewards[0].float() if self.uses_shift else self.kl * self.args.beta
        above = _above(rewards - level)
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
        kl = kl_estimate(self._kl_sums(model, batch)) if self.uses_kl else self.kl
        return self._losses(model, batch, kl)[1]

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = super().evaluation_metrics(sums)
        if {f"rewards/{of}" for of in LABELS} <= set(metrics):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        if self.uses_shift:
            pending = self.accelerator.reduce(self._rewards[2:].clone(), "sum")
            if self.args.should_save:
                save_file({"rewards": torch.cat([self._rewards[:2], pending]).cpu()}, checkpoint / STATE_FILE)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        if self.uses_shift and (path := checkpoint / STATE_FILE).is_file():
            self._rewards = load_file(path)["rewards"].to(self.args.device)
            if self.args.process_index:
                self._rewards[2:] = 0  # the first process brings what all had
