"""Rewards of images by rule: size as JPEG, brightness, colourfulness, and the colour that a prompt names.

Functions `f(images, ...) -> (B,)` of a tensor `(B, 3, H, W)` in [0, 1]. Those that say `differentiable` keep the
gradient to the images, also of pixels outside that range. Deliberately not here: rewards that need a model
(image_models.py).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.builtin.pictures import COLOURS
from shared.rewards.pictures import by_size, to_pil, within

QUALITY = 95  # of the DDPO paper's JPEGs
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG
TINY = 1e-10  # under a root, whose slope is endless at 0

# Of `colour_reward`; distances are those of red, green and blue in [0, 1].
SEEN = 0.25  # from the background at which a pixel is seen as part of an object, or from grey as coloured
NEAR, FADES = 0.1, 0.35  # from the colour that count little, and by which what a pixel is worth falls to 1 / e
SHARPNESS = 20.0  # of the choice between colours, by the squared distance
SMALLEST, LARGEST = 0.05, 0.5  # share of a picture that an object takes up, at least and at most
EDGE = 1 / 16  # of a side: so much around the picture is background


def jpeg_incompressibility_reward(images: Sequence[Any]) -> list[float]:
    """Kilobytes (1000) of each image as a JPEG of quality 95, without its headers.

    Args:
        images: B PIL images.

    Paper: DDPO (Black et al. 2023). Headers, the same for all images, would hide what there is of small ones.
    """
    return [_jpeg_bytes(to_pil(image)) / 1000 for image in images]


def jpeg_compressibility_reward(images: Sequence[Any]) -> list[float]:
    """Minus `jpeg_incompressibility_reward`: more for images that a JPEG needs less room for.

    Args:
        images: B PIL images.
    """
    return [-size for size in jpeg_incompressibility_reward(images)]


@by_size
def brightness_reward(images: Tensor) -> Tensor:
    """Mean luma of each image (ITU-R BT.601), from 0, black, to 1, white.

    Args:
        images: `(B, 3, H, W)`.
    """
    return (within(images) * images.new_tensor(LUMA)[:, None, None]).sum(1).mean((1, 2))


@by_size
def colourfulness_reward(images: Tensor) -> Tensor:
    """How colourful each image is: 0 grey, .13 moderately, .32 highly; the paper's figure over 255.

    The spread of red - green and of yellow - blue over the pixels, and .3 times how far their means are from grey.

    Args:
        images: `(B, 3, H, W)`.

    Paper: Hasler & Süsstrunk, Measuring colourfulness in natural images (2003).
    """
    red, green, blue = within(images).flatten(2).unbind(1)
    axes = torch.stack([red - green, (red + green) / 2 - blue])
    spread = (axes.var(-1, correction=0).sum(0) + TINY).sqrt()
    return spread + 0.3 * (axes.mean(-1).square().sum(0) + TINY).sqrt()


@by_size
def colour_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How well what is drawn on a plain grey background has the colour that its prompt names, from 0 to 1.

    Of the pixels that differ from the background, half by how near they are to that very colour, which leads there
    from any other, and half by whether it is the nearest of red, green, blue, yellow, purple and cyan: about .97 for
    the right colour, .05 to .2 for another. It falls to 0 where the background is coloured, where the object reaches
    the border, and where there is little or none: a picture that is filled with the colour gets nothing. NaN where a
    prompt names none of these colours.

    Args:
        images: `(B, 3, H, W)`.
        prompts: B; the first colour of each counts.
    """
    palette = images.new_tensor(list(COLOURS.values())) / 255
    named = [_colour_in(prompt) for prompt in prompts]
    wanted = torch.tensor([0 if at is None else at for at in named], device=images.device)
    known = torch.tensor([at is not None for at in named], device=images.device)
    own = torch.arange(len(images), device=images.device), wanted

    images = within(images)
    around = _around(images)
    background = images[:, :, around].mean(-1)
    differs = _length(images - background[:, :, None, None])
    seen = 1 - torch.exp(-(differs / SEEN).pow(3))
    weight = seen * differs.square()  # less for an outline, which is blurred
    apart = (images[:, None] - palette[:, :, None, None]).square().sum(2)
    near = torch.exp((NEAR - (apart[own] + NEAR**2).sqrt()) / FADES)
    chosen = (-SHARPNESS * apart).softmax(1)[own]
    colour = (weight * (near + chosen) / 2).sum((1, 2)) / (weight.sum((1, 2)) + 1e-3)

    area = seen.mean((1, 2))
    sized = torch.sigmoid((area - SMALLEST / 2) / (SMALLEST / 10)) * torch.sigmoid((LARGEST * 1.1 - area) * 40)
    grey = torch.exp(-(_length(images - images.mean(1, keepdim=True)) / SEEN).pow(3))
    plain = (grey * (1 - seen))[:, around].mean(1)
    return torch.where(known, colour * sized * plain.square(), torch.nan)


def _length(vectors: Tensor) -> Tensor:
    """The lengths `(B, H, W)` of colours `(B, 3, H, W)`."""
    return (vectors.square().sum(1) + TINY).sqrt()


def _around(images: Tensor) -> Tensor:
    """`(H, W)` bool, the pixels around the edge."""
    height, width = (max(1, round(EDGE * side)) for side in images.shape[2:])
    around = torch.ones(images.shape[2:], dtype=torch.bool, device=images.device)
    around[height:-height, width:-width] = False
    return around


@functools.cache
def _colour_in(prompt: str) -> int | None:
    """The place in the palette of the first colour that a prompt names."""
    found = re.search(rf"\b({'|'.join(COLOURS)})\b", prompt.lower())
    return list(COLOURS).index(found[1]) if found else None


def _jpeg_bytes(image: Any) -> int:
    """Bytes of an image as a JPEG, but for the segments before its data and the mark behind them."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    data = buffer.getvalue()
    at = 2  # behind the mark of the start
    while data[at + 1] != 0xDA:  # start of scan
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data) - at - 2


for _function in (jpeg_incompressibility_reward, jpeg_compressibility_reward):
    _function.takes, _function.differentiable = "pil", False
for _function in (brightness_reward, colourfulness_reward, colour_reward):
    _function.differentiable = True
