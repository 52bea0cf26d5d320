"""The one place where a processor is called: rows that are read, to tensors.

Knows how processors differ in what they take (lists of lists, rows they lose, videos they cannot mix); what becomes of
the result is collators.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.data.chat import find_all
from visionalign.reading import Item, Reader
from visionalign.video import video_inputs

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_NOT_INPUTS = ("input_ids", "attention_mask", "labels", "offset_mapping", "text_replacement_offsets")


class Processing:
    """Calls a processor on rows.

    Args:
        processor: the model's.
        reader: of its family; makes the blank rows that some processors need.
    """

    def __init__(self, processor: ProcessorMixin, reader: Reader):
        self.processor, self.reader, self.family = processor, reader, reader.family

    def __call__(self, items: Sequence[Item], side: str) -> dict[str, Any]:
        """What the processor gives for all items; texts are padded at `side`."""
        if self.family.videos_alone and any(item.videos for item in items):
            return self._one_by_one(items, side)
        seen = [bool(item.images) for item in items]
        wrap = self.family.image_at_ends and any(seen) and not (seen[0] and seen[-1])
        if wrap:
            items = [self.reader.blank(), *items, self.reader.blank()]
        out = self._called(items, side)
        return {name: value[1:-1] if wrap else value for name, value in out.items()}

    def _called(self, items: Sequence[Item], side: str) -> dict[str, Any]:
        family = self.family
        images: list[Any] | None = [item.images for item in items]
        if not any(images):
            images = None
        elif not family.images_per_row:
            images = [image for item in items for image in item.images]
        options: dict[str, Any] = {}
        if not family.prefix_suffix:
            options = {"return_text_replacement_offsets": True} if family.expands_text else {}
        elif items[0].suffix is not None:
            options = {"suffix": [item.suffix for item in items]}
        bos = self.reader.bos
        has_bos = family.bos_in_text or (bos is not None and items[0].text.startswith(bos))
        return self.processor(
            text=[item.text for item in items],
            images=images,
            # Texts stay lists: offsets are looked up at a few places, and a tensor of them all would cost more.
            text_kwargs={
                "padding": True,
                "padding_side": side,
                "return_offsets_mapping": side == "right" and not family.prefix_suffix,
                "add_special_tokens": not has_bos,
                "return_tensors": None,
            },
            images_kwargs={"return_tensors": "pt"},
            **video_inputs([video for item in items for video in item.videos], self.processor),
            **options,
        )

    def _one_by_one(self, items: Sequence[Item], side: str) -> dict[str, Any]:
        """The rows of a batch, each as it is alone."""
        outs = [self._in_order(item, dict(self._called([item], side))) for item in items]
        width = max(len(out["input_ids"][0]) for out in outs)
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}
        joined: dict[str, Any] = {}
        for name in dict.fromkeys(name for out in outs for name in out):
            values = [out.get(name) for out in outs]
            if name in fill:
                padding = [[fill[name]] * (width - len(value[0])) for value in values]
                joined[name] = [
                    [*more, *value[0]] if side == "left" else [*value[0], *more]
                    for value, more in zip(values, padding, strict=True)
                ]
            elif isinstance(next(value for value in values if value is not None), Tensor):
                joined[name] = stacked(values, rows=True)
            else:
                joined[name] = [each for value in values for each in value]
        return joined

    def _in_order(self, item: Item, out: dict[str, Any]) -> dict[str, Any]:
        """The output of a row with the pixels of its images and frames as they stand in the text, as one sample."""
        if not item.videos:
            return out
        tokens = {self.reader.tokens[kind]: kind for kind in ("image", "video")}
        places = sorted((at, kind) for token, kind in tokens.items() for at in find_all(item.text, token))
        names = [name for name in out if name not in _NOT_INPUTS]
        options = {"return_tensors": "pt"}
        images = iter([self.processor.image_processor([image], **options) for image in item.images])
        clips = iter(range(len(item.videos)))
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for _, kind in places:
            clip, image = (next(clips), None) if kind == "video" else (None, next(images))
            for name in names:
                frames = None if clip is None else out[name][clip][: len(item.videos[clip].frames)]
                parts[name].append(image[name][0] if frames is None else frames)
        return out | {name: torch.cat(values)[None] for name, values in parts.items()}


def extras_of(out: dict[str, Any]) -> dict[str, Any]:
    """What the model takes beside the tokens, of what a processor gives."""
    return {name: value for name, value in out.items() if name not in _NOT_INPUTS}


def as_tensor(value: Any) -> Tensor:
    """A tensor of what a processor gives; fractions in single precision."""
    if isinstance(value, Tensor):
        return value
    value = np.asarray(value)
    return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float64 else value)


def stacked(values: Sequence[Tensor | None], *, rows: bool, width: int | None = None) -> Tensor:
    """Tensors one behind the other, the axes behind the first filled up with zeros to one shape.

    Args:
        values: None where a prompt (or row) has none.
        rows: such a one has a row of zeros all the same.
        width: size of the second axis; then it is filled up in front.
    """
    pattern = next(value for value in values if value is not None)
    absent = pattern.new_zeros(1, *pattern.shape[1:]) if rows else None
    given = [absent if value is None else value for value in values]
    given = [value for value in given if value is not None]
    shape = [max(value.shape[axis] for value in given) for axis in range(1, pattern.dim())]
    if width is not None:
        shape[0] = width
    if all(list(value.shape[1:]) == shape for value in given):
        return torch.cat(given)
    joined = pattern.new_zeros(sum(len(value) for value in given), *shape)
    at = 0
    for value in given:
        place = [slice(at, at + len(value)), *(slice(0, size) for size in value.shape[1:])]
        if width is not None:
            place[1] = slice(width - value.shape[1], width)
        joined[tuple(place)] = value
        at += len(value)
    return joined
