"""Options of the vision-language trainers that tell a prompt from its answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.runtime.options import option
from visionalign.image_options import ImageOptions
from visionalign.options import VideoOptions


@dataclass
class VLMPromptOptions(ImageOptions, VideoOptions):
    """Prompts with images and videos, and which parts of the model are trained."""

    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens, image tokens included; a longer one is an error. Unset: no limit."
    )
    pad_to_multiple_of: int | None = option(None, "Pad completions to a multiple of so many tokens.")
    chat_template_kwargs: dict[str, Any] | None = option(None, "Variables for the chat template, as JSON.")
    freeze_vision_tower: bool = option(False, "Leave the vision tower as it is.")
    freeze_projector: bool = option(False, "Leave the projector between vision and language as it is.")
    freeze_language_model: bool = option(False, "Leave the language model as it is.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the model is given by name."
    )
