"""What a 32 x 32 picture shows, by a simple rule: the colour and the form of the one object on its background.

The background is the median of the picture's edge. The object is what differs from it at least half as much as the
pixels that differ most; its colour is the nearest of `COLOURS` to the mean of its pixels, its form the one whose
outline, stretched to its bounding box, overlaps it most. On drawn pictures both are right (tests say so); a picture
without a clear object shows nothing. This is a measure, not a reward with a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from shared.builtin.pictures import COLOURS, FORMS
from shared.builtin.shapes import cover

if TYPE_CHECKING:
    import torch

LEAST_CONTRAST = 0.15  # of the object against the background, of 1 in each channel
FARTHEST = 0.3  # a mean colour further away than this from all of `COLOURS` is none of them
LEAST_OVERLAP = 0.6  # intersection over union with a form's outline
LEAST_PIXELS, MOST_SHARE = 30, 0.6  # of an object, and of the picture
_BOX = 20  # pixels across; outlines are compared at this size

_PALETTE = np.array(list(COLOURS.values()), np.float32) / 255
_OUTLINES = np.stack([cover(form, _BOX) >= 0.5 for form in FORMS])


class Seen(NamedTuple):
    """What a picture shows; None where that is not clear."""

    colour: str | None
    form: str | None


def see(picture: np.ndarray) -> Seen:
    """Colour and form of the object in a picture (H, W, 3) of values in [0, 1]."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    differs = np.linalg.norm(picture - np.median(edge, axis=0), axis=-1)
    most = np.quantile(differs, 0.97)
    inside = differs >= most / 2
    if most < LEAST_CONTRAST or not LEAST_PIXELS <= inside.sum() <= MOST_SHARE * inside.size:
        return Seen(None, None)
    mean = picture[differs >= 0.75 * most].mean(axis=0)
    distances = np.linalg.norm(_PALETTE - mean, axis=1)
    colour = list(COLOURS)[distances.argmin()] if distances.min() <= FARTHEST else None
    return Seen(colour, _form(inside))


def _form(inside: np.ndarray) -> str | None:
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    stretched = np.asarray(Image.fromarray(box).resize((_BOX, _BOX), Image.Resampling.NEAREST))
    overlaps = (_OUTLINES & stretched).sum((1, 2)) / (_OUTLINES | stretched).sum((1, 2))
    return FORMS[overlaps.argmax()] if overlaps.max() >= LEAST_OVERLAP else None


def asked_for(prompt: str) -> Seen:
    """The first colour and the first form that a prompt names."""
    words = re.findall(r"\w+", prompt.lower())
    return Seen(*(next((word for word in words if word in known), None) for known in (COLOURS, FORMS)))


def right_colour(images: torch.Tensor | Sequence[Any], prompts: Sequence[str], **_: Any) -> list[float]:
    """1 for each picture whose object has the colour that its prompt names, else 0; a reward without a gradient.

    Args:
        images: tensor (N, 3, H, W) or tensors (3, H, W) of values in [0, 1], or PIL images.
        prompts: what was asked for.
    """
    return _shares(images, prompts, lambda seen, asked: seen.colour == asked.colour)


def right_form(images: torch.Tensor | Sequence[Any], prompts: Sequence[str], **_: Any) -> list[float]:
    """1 for each picture whose object has the form that its prompt names, else 0; arguments as `right_colour`."""
    return _shares(images, prompts, lambda seen, asked: seen.form == asked.form)


def right_picture(images: torch.Tensor | Sequence[Any], prompts: Sequence[str], **_: Any) -> list[float]:
    """1 for each picture that shows the colour and the form that its prompt names; arguments as `right_colour`."""
    return _shares(images, prompts, lambda seen, asked: seen == asked)


right_colour.figure, right_form.figure, right_picture.figure = "right_colour", "right_form", "right_picture"
right_colour.differentiable = right_form.differentiable = right_picture.differentiable = False


def _shares(images: Any, prompts: Sequence[str], right: Callable[[Seen, Seen], bool]) -> list[float]:
    pairs = zip(images, prompts, strict=True)
    return [float(right(see(pixels(image)), asked_for(prompt))) for image, prompt in pairs]


def pixels(image: Any) -> np.ndarray:
    """A picture as (H, W, 3) float32 in [0, 1], from a PIL image or a tensor (3, H, W)."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), np.float32) / 255
    return image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
