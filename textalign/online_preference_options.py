"""Options of the text trainers that learn from pairs of their own completions, as the command line shows them.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from shared.trainers.online_preference_options import NashMDStepOptions, OnlinePreferenceOptions, XPOStepOptions
from shared.trainers.preference_options import PairLossOptions
from shared.trainers.reference_options import ReferenceModelOptions
from textalign.online_options import TextSamplingOptions


@dataclass
class PairSamplingOptions(TextSamplingOptions):
    """Writing text."""

    max_completion_length: int = option(64, "Longest completion, in tokens.")
    max_new_tokens: int | None = option(
        None,
        "Longest answer before and after training; where max_completion_length is not given, of all completions. "
        "Unset: max_completion_length.",
    )
    temperature: float = option(0.9, "Divides the logits, in sampling and in training.")


@dataclass
class OnlineDPOOptions(PairSamplingOptions, OnlinePreferenceOptions, PairLossOptions, ReferenceModelOptions):
    """Online DPO."""


@dataclass
class XPOOptions(PairSamplingOptions, XPOStepOptions, PairLossOptions, ReferenceModelOptions):
    """XPO."""


@dataclass
class NashMDOptions(PairSamplingOptions, NashMDStepOptions, ReferenceModelOptions):
    """Nash-MD."""
