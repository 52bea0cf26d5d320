"""Options that all text trainers share, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class TokenizerOptions(AlignOptions):
    """Model and tokenizer."""

    pad_to_multiple_of: int | Literal["auto"] | None = option(
        None, "Pad rows to a multiple of so many tokens. auto: as unset."
    )
    chat_template_path: str | None = option(
        None, "Chat template to use: a Jinja file, or a model (folder or hub id) whose template is taken over."
    )
    eos_token: str | None = option(None, "Token that ends an answer. Unset: the tokenizer's.")
    pad_token: str | None = option(None, "Token that fills rows up. Unset: the tokenizer's, or its eos_token.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the model is given by name."
    )


@dataclass
class TextOptions(TokenizerOptions):
    """Text."""

    max_length: int | None = option(
        1024, "Longest row in tokens, prompt and answer together; longer ones are cut and counted. none: no cut."
    )
    truncation_mode: Literal["keep_start", "keep_end"] = option(
        "keep_start", "Which end of a row that is too long is kept."
    )
    dataset_num_proc: int | None = option(
        None, "Processes that turn rows into tokens. Unset: one, which uses all cores for the tokenizer's part."
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = option(
        "group_by_length", "Order of the rows; group_by_length: at random, with rows of similar length in a batch."
    )
