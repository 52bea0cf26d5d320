"""Options of the text trainers that write completions themselves, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.runtime.options import option
from shared.trainers.online_options import PolicyGradientOptions, SamplingOptions, TokenUpdateOptions
from shared.trainers.reference_options import ReferenceModelOptions
from textalign.options import TokenizerOptions


@dataclass
class TextSamplingOptions(SamplingOptions, TokenizerOptions):
    """Writing text."""

    chat_template_kwargs: dict[str, Any] | None = option(
        None, "Variables for the chat template, as JSON; those of a row's own column win."
    )


@dataclass
class GRPOOptions(TextSamplingOptions, PolicyGradientOptions, ReferenceModelOptions):
    """Group-relative policy optimisation."""


@dataclass
class RLOOOptions(TextSamplingOptions, TokenUpdateOptions, ReferenceModelOptions):
    """REINFORCE leave-one-out."""

    num_generations: int = option(2, "G, samples of each prompt; the others are the baseline of each.")
    beta: float = option(0.05, "Weight of the KL divergence to the reference, taken off the reward; 0 loads none.")
    normalize_advantages: bool = option(False, "Bring a round's advantages to mean 0 and standard deviation 1.")
    reward_clip_range: list[float] | None = option(None, "Least and greatest reward; what is beyond is clipped.")
