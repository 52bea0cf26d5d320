"""The reference of a vision-language trainer: loaded by name, and kept under a key of what rows show."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import nn

from shared.data.rows import ROW, Rows
from shared.errors import DataError, UserError
from shared.runtime.models import load_model
from shared.trainers.keeping import preserved_randomness
from shared.trainers.reference_beforehand import config_of
from shared.trainers.reference_cache import PAIRED
from shared.trainers.referenced import Referenced
from visionalign.families import family_of
from visionalign.feature_rows import digest, image_key
from visionalign.pairs import REFERENCE, VLMPairCollator, read_images


class VLMReference(Referenced):
    """What a vision-language trainer with a reference adds to a trainer whose constructor makes its reference."""

    def take_reference(self, model: Any, ref_model: Any, args: Any, **given: Any) -> None:
        super().take_reference(model, ref_model, args, **given)
        if self.reference_given is not None:
            check_sees_alike(model, self.reference_given, args)

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        with preserved_randomness():
            init = {**(self.args.model_init_kwargs or {}), **options}
            return load_model(name, head="image-text-to-text", frozen=True, seed=self.args.seed, **init)

    def with_reference(self, reference: Any, rows: Rows, **options: Any) -> Rows:
        collator: VLMPairCollator = self.data_collator
        parts: dict[tuple[str, ...], Callable] = dict(PAIRED)
        if collator.corrupt is not None:
            parts[REFERENCE[2:]] = lambda batch: batch.corrupted
        content = content_of(rows, collator)
        return super().with_reference(reference, rows, content=content, parts=parts, **options)


def check_sees_alike(model: str | nn.Module, ref_model: str | nn.Module, args: Any) -> None:
    """See that a given reference model can be shown what the model's own processor makes of rows.

    Args:
        model, ref_model: the policy's model and the reference, or their names, whose configurations alone are read.
        args: the trainer's options.

    Raises:
        UserError: the two are of different families, or have other tokens.
    """
    if not isinstance(model, (str, nn.Module)):
        return  # which is said elsewhere
    own, other = (
        config_of(each, args) if isinstance(each, str) else getattr(each, "config", None)
        for each in (model, ref_model)
    )
    if own is None or other is None:
        return
    (family, token), (reference, known) = ((family_of(c).name, _image_token(c)) for c in (own, other))
    if (family, token) != (reference, known):
        raise UserError(
            f"The reference model is of the family {reference} (image token {known}), the model of {family} "
            f"({token}): what one reads the other cannot. Give a reference of the model's family with its tokenizer, "
            "or leave ref_model out: the model as it is at the start is then the reference."
        )


def _image_token(config: Any) -> int | None:
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))


def content_of(rows: Rows, collator: VLMPairCollator) -> str:
    """What stands for preference rows, with what they show, and for how a collator makes tokens and pixels of them.

    What a function of the user's makes of images is not known: it has another key in each run.
    """
    reader, processor, corrupt = collator.collator.reader, collator.collator.processor, collator.corrupt
    made_by = {
        "processor": processor.to_dict(),
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
        "special tokens": processor.tokenizer.special_tokens_map,
        "template": getattr(processor, "chat_template", None),
        "reading": {name: _plain(value) for name, value in vars(reader).items() if value is not processor},
        "limits": [collator.prompts.longest, collator.max_completion_length],
        "left out": [collator.collator.on_bad_row, collator.prompts.needs_image],
        "corruption": _plain(corrupt) if corrupt is None or is_dataclass(corrupt) else secrets.token_hex(),
    }
    keys = [_row_key(rows[at], skip=collator.collator.on_bad_row == "skip") for at in range(len(rows))]
    return digest(made_by, keys)


def _plain(value: Any) -> Any:
    """A record of plain values as it says itself; of anything else, what it is."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if value is None or isinstance(value, (str, int, float, dict, tuple)):
        return repr(value)
    return type(value).__qualname__


def _row_key(row: dict[str, Any], *, skip: bool) -> str:
    try:
        chosen, rejected = read_images(row, row[ROW])
    except DataError as error:
        if not skip:
            raise
        return digest(str(error))  # the collator leaves it out
    extras = {name: chosen.extras.get(name) for name in ("tools", "chat_template_kwargs")}
    shown = [_shown_key(raw) for raw in (*chosen.images, *chosen.videos)]
    return digest(chosen.row, chosen.messages, rejected.messages, extras, shown)


def _shown_key(raw: Any) -> str:
    """What stands for an image's or a video's content."""
    if isinstance(raw, dict) and "frames" in raw:
        return digest(raw.get("fps"), _shown_key(raw["frames"]))
    if isinstance(raw, (list, tuple)):
        return digest(*map(_shown_key, raw))
    if isinstance(raw, np.ndarray):
        return digest(raw.shape, raw.tobytes().hex())
    return image_key(raw)
