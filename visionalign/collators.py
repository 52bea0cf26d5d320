"""Rows of images, videos and chat to batches: what the model sees, and which of its tokens are learnt.

The processor is called once for a batch (processing.py) and stays opaque: nothing is known here of how a family lays
out its images beyond its row in families.py. Learnt are the characters that shared.data.chat names, moved to where the
processor's placeholders push them; placeholders, the tokens and words around images and frames, padding and a row's
first token never are.

Deliberately not here: packing, preference pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.data.chat import token_ranges
from shared.data.schema import Kind
from shared.errors import DataError, UserError
from shared.policies.base import GroupedBatch
from visionalign.families import FAMILIES, TOKEN, Family, placeholder_ids
from visionalign.processing import Processing, as_tensor, extras_of
from visionalign.reading import Item, Reader, row_number
from visionalign.video import VideoReader, video_reader

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class _Encoded:
    """A batch as the processor gives it, not cut yet."""

    ids: np.ndarray  # (B, T)
    attention: np.ndarray  # (B, T)
    lengths: list[int]  # real tokens of each row
    placeholder: np.ndarray  # (B, T) bool: stands for an image, or frames one
    learnt: np.ndarray  # (B, T) bool
    extras: dict[str, Any]


class VLMCollator:
    """Collates rows of a vision-language data set into a GroupedBatch of whole rows.

    Args:
        processor: the model's processor.
        family: the model's row of families.py.
        kind: what the data set is: MESSAGES or PROMPT_COMPLETION (PROMPT_ONLY for `encode_prompts` alone).
        loss_on: `assistant`, `completion` or `all`; see shared.data.chat.render.
        max_length: longer rows lose their end. Never inside or before an image: that is an error.
        max_pixels: images with more pixels are made smaller, keeping their aspect.
        on_bad_row: `error`, or `skip` to leave bad rows out and list them in `skipped`.
        pad_to_multiple_of: pad the token dimension to a multiple of this.
        always_image: give a batch without any image one more row with a tiny blank one and nothing to learn: where an
            engine shards the vision tower, all processes have to run it.
        always_video: likewise for batches without video, of families whose videos go through the tower apart.
        videos: how videos are read; None: as the family usually does.
        template_kwargs: more variables for the chat template.

    Attributes:
        skipped: row number → why it was left out.
        truncated: row number → how many tokens it has, for rows that lost their end. Like `skipped` it fills in the
            process that collates: data-loader workers have their own.

    Raises:
        UserError: no chat template, or options that do not go with the data or the family.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        family: Family,
        kind: Kind,
        loss_on: str = "assistant",
        max_length: int | None = None,
        max_pixels: int | None = None,
        on_bad_row: str = "error",
        pad_to_multiple_of: int | None = None,
        always_image: bool = False,
        always_video: bool = False,
        videos: VideoReader | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ):
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row is {on_bad_row!r}, allowed: error, skip")
        self.reader = Reader(
            processor,
            family=family,
            kind=kind,
            loss_on=loss_on,
            max_pixels=max_pixels,
            template_kwargs=template_kwargs,
            videos=videos or video_reader(family, processor),
        )
        self.process = Processing(processor, self.reader)
        self.processor, self.family, self.kind = processor, family, kind
        self.max_length, self.on_bad_row = max_length, on_bad_row
        self.pad_to_multiple_of, self.always_image = pad_to_multiple_of, always_image
        self.always_video = always_video and family.video_passes
        self.skipped: dict[int, str] = {}
        self.truncated: dict[int, int] = {}
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # the mask tells padding from text, not the token
        ids = sorted(placeholder_ids(processor, family=family))
        self._placeholder = np.zeros(max([len(tokenizer), *ids]) + 1, dtype=bool)
        self._placeholder[ids] = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> GroupedBatch:
        """Collate rows, each its data set's columns and its number under `__row__`, to a right-padded batch.

        Raises:
            DataError: naming the row and what is wrong with it; with `on_bad_row="skip"` only when no row is left.
        """
        numbers = [row_number(row, at) for at, row in enumerate(rows)]
        result: list[Item] | GroupedBatch = self._sift(numbers, lambda at: self.reader.read(rows[at], at))
        spent = False
        while isinstance(result, list):
            if not result and self.on_bad_row == "skip" and not (self.family.prefix_suffix or spent):
                spent, result = True, [self.reader.blank()]  # of which nothing is learnt: the step goes on without
            elif not result:
                reasons = "; ".join(self.skipped[number] for number in numbers if number in self.skipped)
                raise DataError(f"No row of a batch can be used: {reasons}")
            result = self._attempt(result)
        for number in numbers:
            if number in self.skipped:
                result.notes[number] = f"left out: {self.skipped[number].removeprefix(f'row {number}: ')}"
            elif number in self.truncated:
                result.notes[number] = f"cut from {self.truncated[number]} tokens to {self.max_length}"
        return result

    def encode_prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]:
        """What the model is asked in each row, left-padded for generation, and the answers to compare with.

        A prompt is all before the completion, or before the last assistant turn, with an assistant turn's header;
        the answer is the text of that turn, "" where the row has none.

        Raises:
            DataError: naming the row, whatever `on_bad_row` says: answers must stay beside their rows.
        """
        asked = [self.reader.ask(row, at) for at, row in enumerate(rows)]
        out = self.process([item for item, _ in asked], side="left")
        inputs = {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"], **extras_of(out)}
        return {name: as_tensor(value) for name, value in inputs.items()}, [answer for _, answer in asked]

    def _sift(self, numbers: Sequence[int], work: Callable[[int], Item]) -> list[Item]:
        """The results of `work` on 0, 1, …; where it finds a row bad, `on_bad_row` says what happens."""
        good = []
        for at, number in enumerate(numbers):
            try:
                good.append(work(at))
            except DataError as error:
                if self.on_bad_row == "error":
                    raise
                self.skipped[number] = str(error)
        return good

    def _attempt(self, items: list[Item]) -> GroupedBatch | list[Item]:
        """The batch of the items, or those of them that are good."""
        real = len(items)
        missing = self._missing(items)
        if missing:
            items = [*items, self.reader.blank(*missing)]
        numbers = [item.row for item in items[:real]]
        try:
            out = self.process(items, side="right")
        # A processor may fail on an image in any way: a side too short, an aspect too long.
        except Exception as error:
            good = self._sift(numbers, lambda at: self._alone(items[at]))
            if len(good) == real:
                raise error
            return good
        encoded = self._encode(items, out)
        if self.max_length and len(items) > real and encoded.lengths[-1] > self.max_length:
            shown = " and ".join({"image": "an image", "video": "a video"}[kind] for kind in missing)
            raise UserError(
                f"A row with {shown} takes {encoded.lengths[-1]} tokens or more, max_length is {self.max_length}; all "
                f"processes have to see {shown} in each batch here: raise max_length above that."
            )
        fits = encoded.ids.shape[1] <= (self.max_length or encoded.ids.shape[1])
        if not (fits and encoded.learnt[:real].any(1).all()):
            good = self._sift(numbers, lambda at: self._check(items[at], encoded, at))
            if len(good) < real:
                return good
        return self._batch(encoded)

    def _missing(self, items: Sequence[Item]) -> list[str]:
        """What each batch has to show and these rows do not."""
        video = any(item.videos for item in items)
        image = any(item.images for item in items) or (video and not self.family.video_passes)
        return ["image"] * (self.always_image and not image) + ["video"] * (self.always_video and not video)

    def _alone(self, item: Item) -> Item:
        """The item, when the processor takes it. Raises DataError with what the processor says otherwise."""
        try:
            self.process([item], side="right")
        except Exception as error:
            raise DataError(f"row {item.row}: the processor cannot take it: {error}") from error
        return item

    def _encode(self, items: list[Item], out: dict[str, Any]) -> _Encoded:
        """Token ids and masks `(B, T)` of what the processor gave."""
        ids, attention = np.array(out["input_ids"]), np.array(out["attention_mask"])
        lengths = attention.sum(1).tolist()
        placeholder = self._placeholder[np.minimum(ids, len(self._placeholder) - 1)]
        if self.family.prefix_suffix:
            learnt = np.array(out["token_type_ids"]) == 1
        else:
            learnt = np.zeros(ids.shape, dtype=bool)
            replaced = out.get("text_replacement_offsets") or [[]] * len(items)
            for at, item in enumerate(items):
                offsets = out["offset_mapping"][at][: lengths[at]]
                if not replaced[at] and offsets[-1][1] > len(item.text):
                    raise UserError(
                        f"A {type(self.processor).__name__} changes the text without telling where, so it cannot be "
                        f"said which tokens are learnt; the families that are tested are {', '.join(FAMILIES)}."
                    )
                spans = _shift(item.spans, replaced[at])
                for first, last in token_ranges(offsets, spans):
                    learnt[at, first:last] = True
                # A family frames its images with line breaks and words too, which are no tokens of their own.
                framed = [place["new_span"] for place in replaced[at] if spans and place["new_span"][1] > spans[0][0]]
                for first, last in token_ranges(offsets, framed):
                    learnt[at, first:last] = False
        learnt &= (attention == 1) & ~placeholder & np.array([[item.counted] for item in items])
        learnt[:, 0] = False  # a row's first token has no predecessor that could predict it
        return _Encoded(ids, attention, lengths, placeholder, learnt, extras_of(out))

    def _check(self, item: Item, encoded: _Encoded, at: int) -> Item:
        """The item, when something of it is learnt and its images survive `max_length`."""
        limit = self.max_length
        tokens = encoded.lengths[at]
        cut = limit is not None and tokens > limit
        images = np.flatnonzero(encoded.placeholder[at]) if cut else ()
        if len(images) and images[-1] >= limit:
            end = images[-1] + 1
            raise DataError(
                f"row {item.row}: has {tokens} tokens and its last image{' or video' if item.videos else ''} ends at "
                f"token {end}, but max_length is {limit}, which would cut into it. Raise max_length above {end}, or "
                f"{_smaller(item)}."
            )
        if item.counted and not encoded.learnt[at, :limit].any():
            within = f" within max_length {limit}: it has {tokens} tokens" if cut else ""
            raise DataError(f"row {item.row}: has no token to learn{within}")
        if cut:
            self.truncated[item.row] = tokens
        return item

    def _batch(self, encoded: _Encoded) -> GroupedBatch:
        """Cut to `max_length`, padded to the multiple asked for."""
        shape = encoded.ids.shape
        width = min(shape[1], self.max_length or shape[1])
        padding = -width % (self.pad_to_multiple_of or 1)

        def fit(value: Any, fill: int = 0) -> Tensor:
            tensor = as_tensor(value)[:, :width]
            if not padding:
                return tensor
            return torch.cat([tensor, tensor.new_full((tensor.shape[0], padding, *tensor.shape[2:]), fill)], 1)

        def by_token(name: str, value: Any) -> bool:
            if name in self.family.index:
                return self.family.index[name] == TOKEN
            return tuple(np.shape(value)[:2]) == shape

        return GroupedBatch.of_rows(
            fit(encoded.ids, self.processor.tokenizer.pad_token_id),
            attention=fit(encoded.attention),
            mask=fit(encoded.learnt.astype(np.int64)),
            model_inputs={
                name: fit(value) if by_token(name, value) else as_tensor(value)
                for name, value in encoded.extras.items()
            },
        )


def _smaller(item: Item) -> str:
    """What makes a row shorter that shows something."""
    images = ["make images smaller with max_pixels"] if item.images else []
    videos = ["take fewer frames with video_num_frames or smaller ones with video_max_pixels"] if item.videos else []
    return " and ".join(images + videos)


def _shift(spans: list[tuple[int, int]], replaced: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Character spans of the text as given, in the text with its placeholders expanded."""
    if not replaced:
        return spans
    ends = [place["span"][1] for place in replaced]
    gained = [0, *(place["new_span"][1] - place["span"][1] for place in replaced)]
    return [tuple(char + gained[bisect_right(ends, char)] for char in span) for span in spans]
