"""Options of the text preference trainers, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.runtime.options import option
from shared.trainers.preference_options import AnswerLossOptions, BeforehandOptions, PreferenceOptions
from textalign.options import TextOptions


@dataclass
class TextPreferenceOptions(PreferenceOptions, TextOptions):
    """Preference optimisation."""

    max_prompt_length: int | None = option(None, "Prompts lose their beginning beyond so many tokens. Unset: no cut.")
    max_completion_length: int | None = option(None, "Answers lose their end beyond so many tokens. Unset: no cut.")


@dataclass
class ReferenceOptions(TextPreferenceOptions, BeforehandOptions):
    """Preference optimisation against a reference model."""


@dataclass
class DPOOptions(AnswerLossOptions, ReferenceOptions):
    """Direct preference optimisation and its family."""


@dataclass
class CPOOptions(TextPreferenceOptions):
    """Preference optimisation without a reference: CPO, SimPO, AlphaPO."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = option(
        "sigmoid", "Objective: CPO's sigmoid (arXiv:2401.08417), SimPO (arXiv:2405.14734), AlphaPO (arXiv:2501.03884)."
    )
    label_smoothing: float = option(0.0, "Assumed share of pairs whose labels are swapped, below 0.5.")
    cpo_alpha: float = option(1.0, "Weight of the chosen answers' negative log-likelihood.")
    simpo_gamma: float = option(0.5, "Margin between the rewards, of SimPO and AlphaPO.")
    alpha: float = option(0.0, "Shape of AlphaPO's reward; 0: the log-probability.")


@dataclass
class ORPOOptions(TextPreferenceOptions):
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
