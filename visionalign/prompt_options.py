"""Options of the vision-language trainers that tell a prompt from its answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.runtime.options import option
from visionalign.image_options import ImageOptions
from visionalign.options import PartOptions, VideoOptions


@dataclass
class VLMPromptOptions(ImageOptions, VideoOptions, PartOptions):
    """Prompts with images and videos."""

    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens, image tokens included; a longer one is an error. Unset: no limit."
    )
    pad_to_multiple_of: int | None = option(None, "Pad completions to a multiple of so many tokens.")
    chat_template_kwargs: dict[str, Any] | None = option(None, "Variables for the chat template, as JSON.")
