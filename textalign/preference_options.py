"""Options of the preference trainers, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.runtime.options import option
from shared.trainers.reference_options import ReferenceModelOptions
from textalign.options import TextOptions


@dataclass
class PreferenceOptions(TextOptions):
    """Preference optimisation."""

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    beta: float = option(0.1, "Strength of the pull towards the reference; in ORPO the weight of the odds ratio.")
    max_prompt_length: int | None = option(None, "Prompts lose their beginning beyond so many tokens. Unset: no cut.")
    max_completion_length: int | None = option(None, "Answers lose their end beyond so many tokens. Unset: no cut.")
    disable_dropout: bool = option(
        True, "Train without dropout, an adapter's neither, so that policy and reference are the same network."
    )
    share_prefix: bool = option(
        True, "Run each prompt once for all of its answers, where the model can; the result is the same."
    )
    judge: str | None = option(
        None,
        "Function, by its dotted path, that scores a generated answer: f(prompt, answer) -> number. Held-out prompts "
        "are then answered before and after training, and the share of better answers is told.",
    )


@dataclass
class ReferenceOptions(PreferenceOptions, ReferenceModelOptions):
    """Preference optimisation against a reference model."""

    precompute_ref_log_probs: bool = option(
        False, "Run the reference once, before training, and keep what it gives on disk for this and later runs."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Rows of a batch when the reference is run beforehand. Unset: per_device_train_batch_size."
    )


@dataclass
class DPOOptions(ReferenceOptions):
    """Direct preference optimisation and its family."""

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
    ld_alpha: float | None = option(
        None, "Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411). Unset: 1."
    )
    use_weighting: bool = option(
        False, "Weight pairs by how likely the policy is to write them (WPO, arXiv:2406.11827)."
    )


@dataclass
class CPOOptions(PreferenceOptions):
    """Preference optimisation without a reference: CPO, SimPO, AlphaPO."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = option(
        "sigmoid", "Objective: CPO's sigmoid (arXiv:2401.08417), SimPO (arXiv:2405.14734), AlphaPO (arXiv:2501.03884)."
    )
    label_smoothing: float = option(0.0, "Assumed share of pairs whose labels are swapped, below 0.5.")
    cpo_alpha: float = option(1.0, "Weight of the chosen answers' negative log-likelihood.")
    simpo_gamma: float = option(0.5, "Margin between the rewards, of SimPO and AlphaPO.")
    alpha: float = option(0.0, "Shape of AlphaPO's reward; 0: the log-probability.")


@dataclass
class ORPOOptions(PreferenceOptions):
    """Odds-ratio preference optimisation."""


@dataclass
class KTOOptions(ReferenceOptions):
    """Kahneman-Tversky optimisation: single answers labelled good or bad."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = option("kto", "Objective.")
    desirable_weight: float = option(1.0, "Weight of the losses of good answers.")
    undesirable_weight: float = option(1.0, "Weight of the losses of bad answers.")


@dataclass
class BCOOptions(ReferenceOptions):
    """Binary classifier optimisation: single answers labelled good or bad."""

    prompt_sample_size: int = option(1024, "Prompts that are embedded to tell good rows' prompts from bad rows'.")
    min_density_ratio: float = option(0.5, "Least weight of a bad row.")
    max_density_ratio: float = option(10.0, "Greatest weight of a bad row.")
