"""Options of reward modelling on images and videos, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from shared.trainers.scoring_options import PairRewardOptions
from visionalign.prompt_options import VLMPromptOptions


@dataclass
class VLMRewardOptions(PairRewardOptions, VLMPromptOptions):
    """Reward modelling of vision-language models."""

    max_completion_length: int | None = option(None, "Answers lose their end beyond so many tokens. Unset: no cut.")
    freeze_language_model: bool = option(
        False, "Leave the language model as it is; the score head is trained all the same."
    )
