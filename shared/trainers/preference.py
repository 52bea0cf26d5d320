"""Trainers on recorded preferences: what they share, and the one on pairs of a chosen and a rejected answer.

What a modality brings is its policy and its batches; what an objective brings is a pure function. Nothing here knows
either from the inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.data.rows import Rows
from shared.errors import UserError
from shared.objectives.pair_losses import PER_TOKEN
from shared.objectives.preference import PairLosses, PairObjective, Pairs, pair_objective, pairs_of, wpo_weights
from shared.policies.base import GroupedBatch, LogProbs, Policy
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer, answer, evenly_spaced, first_set, sampled
from shared.trainers.judging import Judge, check_columns, figure_of, load_judges, recall, remember, score, win_rate
from shared.trainers.offline import OfflineTrainer
from shared.trainers.reference import NoReference, Reference

LEVEL = 1e-4  # rewards no further apart than this are taken for equal, where a trainer says no other
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
        policy: gives the log-probabilities of a batch's rows.
        asking: how held-out prompts are asked, for the judge.
        judges: score a generated answer; none: nothing is generated.
        ref_model: what `reference_of` is given, once the trainer, and with it the engine, is there.
        As OfflineTrainer otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        policy: Policy,
        asking: Asking | None = None,
        judges: Sequence[Judge] = (),
        ref_model: Any = None,
        **kwargs: Any,
    ):
        self.policy, self.asking, self.judges = policy, asking, list(judges)
        questions = evenly_spaced(asking.questions, args.eval_answers) if asking is not None else None
        for judge in self.judges if questions else ():
            check_columns(judge, questions[0])
        super().__init__(model, args, **kwargs)
        self.reference = self.reference_of(ref_model)

    def objective_options(self, args: Any) -> dict[str, Any]:
        """What the constructor takes of the objective. Bad options are told here, before all else."""
        raise NotImplementedError

    def asked_for(self, args: Any, judge: Any) -> tuple[dict[str, Any], list[Judge]]:
        """The objective by `objective_options`, and the judges: those given, or the options'.

        Raises:
            UserError: options that cannot be followed.
        """
        return self.objective_asked(args), load_judges(args.judge if judge is None else judge)

    def objective_asked(self, args: Any) -> dict[str, Any]:
        """The objective by `objective_options`. Raises UserError for options that cannot be followed."""
        try:
            return self.objective_options(args)
        except ValueError as error:  # an objective's own words for its options
            raise UserError(str(error)) from error

    def reference_of(self, ref_model: Any) -> Reference:
        """The reference of this run. A trainer whose objective has one fills this in."""
        return NoReference()

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """How held-out rows are preferred, and how the judge likes the answers to their prompts."""
        rows = first_set(self.eval_dataset)
        if rows is None or self.args.eval_answers < 1:
            return None
        if len(rows) > ROWS_SCORED:
            some = [at * len(rows) // ROWS_SCORED for at in range(ROWS_SCORED)]
            rows = rows.select(some) if hasattr(rows, "select") else Rows(rows, some)
        output = self.evaluation_loop(self.get_eval_dataloader(rows), "before and after", metric_key_prefix="held")
        figures = {"preference_accuracy": output.metrics["held_rewards/accuracies"]}
        if "held_logps/chosen" in output.metrics:  # pairs can be told apart while both answers become less likely
            figures["logps/chosen"] = output.metrics["held_logps/chosen"]
        judged, samples = self.judged()
        return {**figures, **judged}, samples

    def judged(self) -> tuple[dict[str, float], list[SampleRow]]:
        """What the judges say of answers to held-out prompts, and some of these."""
        asked = self.asking.questions if self.judges and self.asking is not None else None
        if (questions := evenly_spaced(asked, self.args.eval_answers)) is None:
            return {}, []
        answers = answer(self.model, questions, self.asking.encode_prompts, self.asking.tokenizer, self.args)
        prompts = [self.asking.prompt(each.row) for each in answers]
        texts, rows = [each.text for each in answers], [each.row for each in answers]
        judged = {figure_of(judge): score(judge, prompts, texts, rows) for judge in self.judges}
        scores = next(iter(judged.values()))
        folder = Path(self.args.output_dir) / "report"
        before = recall(folder) if self.state.global_step > 0 else None
        if before is None or len(before) != len(scores):
            before = scores
            if self.args.should_save and self.state.global_step == 0:
                remember(scores, folder)
        places = {id(each): at for at, each in enumerate(answers)}

        def show(each: Answer) -> SampleRow:
            sample = self.asking.sample(each)
            sample.answer = ""  # a recorded answer is one of many good ones: nothing is right or wrong by it
            for name, values in judged.items():
                named = "judged" if name == "judge_score" else name
                sample.columns[named] = f"{values[places[id(each)]]:.2f}"
            return sample

        figures = {name: sum(values) / len(values) for name, values in judged.items()}
        lower = getattr(self.judges[0], "lower_is_better", False)
        return figures | {"win_rate": win_rate(scores, before, lower_is_better=lower)}, sampled(answers, show)

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
        As PreferenceTrainer otherwise. Rows of a batch alternate between chosen and rejected; `columns["counted"]`
        `(P,)` says which pairs count.

    Attributes:
        level: rewards no further apart than this are taken for equal.
    """

    level = LEVEL

    def __init__(self, model: nn.Module, args: Any, *, objective: PairObjective, **kwargs: Any):
        self.objective = objective
        super().__init__(model, args, **kwargs)
        self.report.units = {"loss": "per pair", "logps/chosen": "nats", "logps/rejected": "nats"}

    def step_counts(self, batch: GroupedBatch) -> dict[str, Tensor]:
        chosen, pairs = batch.action_mask[0::2].sum(), batch.columns["counted"].sum()
        return {"counted": batch.counted_tokens(), "chosen_tokens": chosen, "pairs": pairs}

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
        self._record_means(_paired_sums(pairs, losses, out, self.level))
        loss = losses.total(pairs=self.step["pairs"], tokens=self.step["chosen_tokens"]) * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def pairs(self, model: nn.Module, batch: GroupedBatch) -> tuple[Pairs, LogProbs]:
        """Log-probabilities of the pairs that count, under policy and reference."""
        weighted = self.objective.use_weighting
        out = self.policy.log_probs(model, batch, **({"collision": True} if weighted else {}))
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
        losses = self.objective.names if len(self.objective.names) > 1 else ()
        terms = {f"loss/{name}": (f"loss/{name}", "chosen_tokens" if name in PER_TOKEN else "rows") for name in losses}
        return {**by_pair, **terms, "mean_token_accuracy": ("correct", "tokens")}

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        pairs, out = self.pairs(model, batch)
        losses = self.objective(pairs)
        return {
            "loss": losses.per_pair.sum(),
            "token_loss": losses.per_token.sum(),
            **_paired_sums(pairs, losses, out, self.level),
        }

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        metrics = super().evaluation_metrics(sums)
        if sums.get("chosen_tokens"):
            metrics["loss"] += sums["token_loss"] / sums["chosen_tokens"]
        return metrics


def _paired_sums(pairs: Pairs, losses: PairLosses, out: LogProbs, level: float) -> dict[str, Tensor]:
    chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
    correct = {}
    if out.correct is not None:  # a token can be the likeliest one, a picture cannot
        mask = out.mask.bool()
        correct = {"correct": (out.correct & mask)[0::2].sum(), "tokens": mask[0::2].sum()}
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": share_above(chosen - rejected, level).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": pairs.chosen.detach().sum(),
        "logps/rejected": pairs.rejected.detach().sum(),
        **{f"loss/{name}": term.sum() for name, term in losses.terms.items()},
        "rows": torch.tensor(pairs.chosen.shape[0], device=chosen.device),
        "chosen_tokens": pairs.chosen_tokens.sum(),
        **correct,
    }


def share_above(differences: Tensor, level: float = LEVEL) -> Tensor:
    """1 where positive, 0 where negative, ½ where level: before training, policy and reference differ by rounding."""
    return (differences > level).float() + 0.5 * (differences.abs() <= level)


def dpo_objective(args: Any) -> PairObjective:
    """The objective of the DPO family that AnswerLossOptions with a `beta` ask for.

    Raises:
        UserError, ValueError: options that are unknown or out of range.
    """
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        raise UserError(f"ld_alpha {args.ld_alpha}: must be at least 0 and at most 1 (plain DPO).")
    return paired_objective(args, use_weighting=args.use_weighting)


def paired_objective(args: Any, *, beta: float | None = None, **more: Any) -> PairObjective:
    """The objective that PairLossOptions with a `beta` ask for, whatever the two answers of a pair are.

    Args:
        args: the options.
        beta: in place of theirs.
        more: as of pair_objective.

    Raises:
        ValueError: options that are unknown or out of range.
    """
    return pair_objective(
        args.loss_type,
        args.loss_weights,
        beta=args.beta if beta is None else beta,
        label_smoothing=args.label_smoothing,
        discopop_tau=args.discopop_tau,
        f_divergence=args.f_divergence_type,
        f_alpha=args.f_alpha_divergence_coef,
        **more,
    )


def check_arguments(compute_metrics: Any, preprocess_logits_for_metrics: Any, model_init: Any = None) -> None:
    """Raise UserError for arguments of transformers.Trainer that these trainers cannot use."""
    for name, value in (
        ("compute_metrics", compute_metrics),
        ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
    ):
        if value is not None:
            raise UserError(f"{name} is not taken: whole logits never exist here. Evaluation has its metrics.")
    if model_init is not None:
        raise UserError("model_init is not taken: give the model, or its name, as model.")
