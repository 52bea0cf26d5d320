"""Options of the vision-language trainers that write answers themselves. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.runtime.options import option
from shared.trainers.online_options import PolicyGradientOptions, SamplingOptions
from shared.trainers.reference_options import ReferenceModelOptions


@dataclass
class VLMGRPOOptions(SamplingOptions, PolicyGradientOptions, ReferenceModelOptions):
    """Group-relative policy optimisation of vision-language models."""

    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens, image tokens included; a longer one is an error. Unset: no limit."
    )
    max_pixels: int | None = option(None, "Scale images with more pixels down to this many, keeping their shape.")
    pad_to_multiple_of: int | None = option(None, "Pad completions to a multiple of so many tokens.")
    chat_template_kwargs: dict[str, Any] | None = option(None, "Variables for the chat template, as JSON.")
    freeze_vision_tower: bool = option(False, "Leave the vision tower as it is.")
    freeze_projector: bool = option(False, "Leave the projector between vision and language as it is.")
    freeze_language_model: bool = option(False, "Leave the language model as it is.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the model is given by name."
    )
