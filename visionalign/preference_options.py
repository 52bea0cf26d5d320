"""Options of preference optimisation on images, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.runtime.options import option
from shared.trainers.preference_options import AnswerLossOptions, BeforehandOptions, PreferenceOptions
from visionalign.prompt_options import VLMPromptOptions


@dataclass
class VLMDPOOptions(AnswerLossOptions, PreferenceOptions, BeforehandOptions, VLMPromptOptions):
    """Direct preference optimisation of vision-language models, and its family."""

    max_completion_length: int | None = option(None, "Answers lose their end beyond so many tokens. Unset: no cut.")
    image_loss_weight: float = option(
        0.0,
        "Weight of mDPO's term that compares the chosen answer beside its image and beside a corrupted one "
        "(arXiv:2406.11839, where it is 1). It costs a second image a row.",
    )
    image_corruption: Literal["crop", "noise", "blank"] = option(
        "crop",
        "Corrupted images: a small piece made as large as the whole, noise laid over, or plain grey.",
        needs="image_loss_weight",
    )
    anchor_loss_weight: float = option(
        0.0, "Weight of mDPO's term that keeps the chosen answer from becoming less likely (1 in the paper)."
    )
    anchor: float = option(0.0, "Reward that the chosen answer should at least have, in the anchor's term.")
