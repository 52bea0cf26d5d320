"""Batches of preference pairs of pictures: pixels of one size, or latents where they were made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusionalign.preference_rows import TIE, is_tie, paired, pictures
from shared.data.rows import PADDING, ROW
from shared.errors import DataError

LATENTS = "__latents__"  # column of a row whose pictures were encoded beforehand: (2, C, h, w)
SIZES = "__sizes__"  # and what `PicturePairs.sizes` says of them


@dataclass
class PicturePairs:
    """P pairs of pictures; rows alternate: chosen, rejected, chosen, ….

    Args:
        prompts: P.
        columns: `counted` `(P,)` bool, whether the pair counts; `row` `(P,)` its number in the data set.
        sizes: `(2P, 4)` height and width of each picture as it is kept, and where it was cut once its shorter side
            fitted: rows of pixels above, columns to the left.
        pixels: `(2P, 3, H, W)` uint8; None where latents are there.
        latents: `(2P, C, h, w)` clean, in the type that they are kept in.
        conditioning: what the denoiser is told of the prompts, `(P, …)` each.
        noise: `(P, E, C, h, w)` float32, E draws for each pair: its two rows have the same.
        at: `(P, E)` the level of noise of each draw.
        notes: row number -> why it was left out.
    """

    prompts: list[str]
    columns: dict[str, Tensor]
    sizes: Tensor
    pixels: Tensor | None = None
    latents: Tensor | None = None
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None
    at: Tensor | None = None
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """2P."""
        return len(self.sizes)

    @property
    def action_mask(self) -> Tensor:
        """`(2P, 1)`, 1 where the row counts."""
        return self.columns["counted"].repeat_interleave(2)[:, None].long()

    def counted_tokens(self) -> Tensor:
        """Scalar: the rows that count."""
        return self.action_mask.sum()

    def seen(self) -> Tensor:
        """Scalar: the rows that count."""
        return self.counted_tokens()

    def _map(self, function) -> PicturePairs:
        changed = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        told = {name: function(value) for name, value in self.conditioning.items()}
        return replace(self, **changed, columns={k: function(v) for k, v in self.columns.items()}, conditioning=told)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PicturePairs:
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PicturePairs:
        """The batch in page-locked memory: called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())


class PicturePairCollator:
    """Rows with `prompt`, `chosen` and `rejected`, or Pick-a-Pic's columns, as PicturePairs.

    Each picture is resized so that it just covers the size asked for, and its middle is cut out.

    Args:
        size: height and width in pixels.
        on_bad_row: "error", or "skip": a row that cannot be used counts nothing, and the batch's notes say why.

    Raises:
        DataError: naming the row and what is wrong with it.
    """

    def __init__(self, size: tuple[int, int], on_bad_row: str = "error"):
        self.size, self.on_bad_row = size, on_bad_row

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PicturePairs:
        pairs, notes = [], {}
        for at, row in enumerate(rows):
            number = int(row.get(ROW, at))
            try:
                if is_tie(row):
                    raise DataError(f"row {number}: {TIE}")
                pairs.append(self._pair(paired(row), number))
            except DataError as error:
                if self.on_bad_row == "error" and not is_tie(row):
                    raise
                notes[number] = f"left out: {str(error).removeprefix(f'row {number}: ')}"
        if not pairs:
            pairs.append(self._blank(rows[0]))  # the step goes on without
        prompts, pixels, sizes, numbers, counted = zip(*pairs, strict=True)
        columns = {"counted": torch.tensor(counted), "row": torch.tensor(numbers)}
        made = "latents" if LATENTS in rows[0] else "pixels"
        return PicturePairs(list(prompts), columns, torch.cat(sizes), **{made: torch.cat(pixels)}, notes=notes)

    def _pair(self, row: dict[str, Any], number: int) -> tuple[str, Tensor, Tensor, int, bool]:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"row {number}: prompt is no text or an empty one")
        counted = not row.get(PADDING)
        if LATENTS in row:
            latents, sizes = row[LATENTS], row[SIZES]
            if not sizes.any():
                raise DataError(f"row {number}: its pictures could not be encoded beforehand")
            return prompt, latents, sizes, number, counted
        pixels, sizes = zip(*(cut(picture, self.size) for picture in pictures(row)), strict=True)
        return prompt, torch.stack(pixels), torch.tensor(sizes), number, counted

    def _blank(self, row: dict[str, Any]) -> tuple[str, Tensor, Tensor, int, bool]:
        """What stands in the place of rows none of which can be used, and counts nothing."""
        height, width = self.size
        made = LATENTS in row
        pixels = torch.zeros_like(row[LATENTS]) if made else torch.zeros(2, 3, height, width, dtype=torch.uint8)
        return "", pixels, torch.tensor([[height, width, 0, 0]] * 2), -1, False


def cut(picture: Any, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A PIL image as `(3, H, W)` uint8, resized to cover the size and cut to its middle; and its entry of `sizes`."""
    from PIL import Image

    height, width = size
    scale = max(height / picture.height, width / picture.width)
    fitted = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (fitted[0] - width) // 2, (fitted[1] - height) // 2
    picture, whole = (picture if fitted == picture.size else picture.resize(fitted, Image.Resampling.LANCZOS)), picture
    pixels = np.array(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), (whole.height, whole.width, top, left)
