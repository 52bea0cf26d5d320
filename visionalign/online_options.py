"""Options of the vision-language trainers that write answers themselves. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.trainers.online_options import PolicyGradientOptions, SamplingOptions
from shared.trainers.reference_options import ReferenceModelOptions
from visionalign.prompt_options import VLMPromptOptions


@dataclass
class VLMGRPOOptions(SamplingOptions, PolicyGradientOptions, ReferenceModelOptions, VLMPromptOptions):
    """Group-relative policy optimisation of vision-language models."""
