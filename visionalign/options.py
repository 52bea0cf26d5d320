"""Options of the vision-language trainers, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class VLMSFTOptions(AlignOptions):
    """Vision-language fine-tuning."""

    loss_type: Literal["nll", "dft"] = option(
        "nll", "Objective: negative log-likelihood, or dynamic fine-tuning (arXiv:2508.05629)."
    )
    assistant_only_loss: bool = option(
        True, "Learn the assistant's turns alone; image places and padding are never learnt."
    )
    completion_only_loss: bool | None = option(
        None, "For rows of prompt and completion: learn the completion alone. Unset: as assistant_only_loss."
    )
    max_length: int | None = option(
        None, "Cut rows after so many tokens, image tokens included. A cut through an image is an error. none: no cut."
    )
    max_pixels: int | None = option(None, "Scale images with more pixels down to this many, keeping their shape.")
    pad_to_multiple_of: int | None = option(None, "Pad rows to a multiple of so many tokens.")
    freeze_vision_tower: bool = option(False, "Leave the vision tower as it is.")
    freeze_projector: bool = option(False, "Leave the projector between vision and language as it is.")
    freeze_language_model: bool = option(False, "Leave the language model as it is.")
    vision_learning_rate: float | None = option(None, "Learning rate of the vision tower. Unset: learning_rate.")
    projector_learning_rate: float | None = option(None, "Learning rate of the projector. Unset: learning_rate.")
    language_learning_rate: float | None = option(None, "Learning rate of the language model. Unset: learning_rate.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the model is given by name."
    )
