"""Options of the preference trainers of every modality, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option
from shared.trainers.reference_options import ReferenceModelOptions


@dataclass
class PreferenceOptions(AlignOptions):
    """Preference optimisation."""

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    beta: float = option(0.1, "Strength of the pull towards the reference; in ORPO the weight of the odds ratio.")
    disable_dropout: bool = option(
        True, "Train without dropout, an adapter's neither, so that policy and reference are the same network."
    )
    share_prefix: bool = option(
        True, "Run each prompt once for all of its answers, where the model can; the result is the same."
    )
    judge: str | list[str] | None = option(
        None,
        "Function, or several, by dotted path, that scores a generated answer: f(prompt, answer) -> number; it gets "
        "the row's columns that its further arguments name. Held-out prompts are then answered before and after "
        "training, and the share of answers is told that are better by the first function.",
    )


@dataclass
class BeforehandOptions(ReferenceModelOptions):
    """Reference model, run before training."""

    precompute_ref_log_probs: bool = option(
        False, "Run the reference once, before training, and keep what it gives on disk for this and later runs."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Rows of a batch when the reference is run beforehand. Unset: per_device_train_batch_size."
    )


@dataclass
class PairLossOptions(AlignOptions):
    """Losses of the DPO family."""

    loss_type: list[str] = option(
        ["sigmoid"],
        "Objective, or several that are added: sigmoid hinge ipo sigmoid_norm exo_pair nca_pair bco_pair robust "
        "sppo_hard aot aot_unpaired apo_zero apo_down discopop sft.",
    )
    loss_weights: list[float] | None = option(None, "Weight of each objective. Unset: 1 each.")
    label_smoothing: float = option(0.0, "Assumed share of pairs whose labels are swapped, below 0.5.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", "Divergence that holds the policy near the reference (arXiv:2309.16240)."
    )
    f_alpha_divergence_coef: float = option(0.5, "α of the alpha divergence.")
    discopop_tau: float = option(0.05, "Temperature of the discopop objective.")


@dataclass
class AnswerLossOptions(PairLossOptions):
    """Losses of the DPO family on answers, which are made of tokens."""

    ld_alpha: float | None = option(
        None, "Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411). Unset: 1."
    )
    use_weighting: bool = option(
        False, "Weight pairs by how likely the policy is to write them (WPO, arXiv:2406.11827)."
    )
