"""What rewards of images share: tensors and PIL images of each other, and pictures that keep within 0 and 1.

An image is a float tensor `(3, H, W)`, in [0, 1] where it comes without a gradient. Deliberately not here: reading
files (shared.data.images).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import DataError


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (images,) = ctx.saved_tensors
        further = ((images > 1) & (gradient < 0)) | ((images < 0) & (gradient > 0))
        return gradient.masked_fill(further, 0)


def within(images: Tensor) -> Tensor:
    """Images clamped to [0, 1], whose pixels outside can still be brought back.

    A clamp has no gradient there at all. Here the part is left out that would take a pixel further away, which no file
    could show: the gradient is taken to be that of a loss, which is followed downwards.

    Args:
        images: `(..., H, W)`.
    """
    return _Within.apply(images)


def to_pil(image: Any) -> Any:
    """An image tensor `(3, H, W)` as a PIL image of 8 bits a channel, outside [0, 1] clamped; others as they are.

    Raises:
        DataError: the tensor is no image.
    """
    from PIL import Image

    if not isinstance(image, Tensor):
        return image
    if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
        kind = str(image.dtype).removeprefix("torch.")
        raise DataError(f"the image is a tensor {tuple(image.shape)} of {kind}, expected (3, H, W) between 0 and 1")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def to_tensor(image: Any) -> Tensor:
    """A PIL image or a tensor `(3, H, W)` as a tensor `(3, H, W)` of float32 between 0 and 1."""
    if isinstance(image, Tensor):
        return image.float()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def by_size(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a batch `(B, 3, H, W)` that takes a list of tensors or PIL images of any sizes too.

    Args:
        function: gets images, and whatever else has one value an image, such as the prompts; gives `(B,)`.
    """

    @functools.wraps(function)
    def scored(images: Tensor | Sequence[Any], *rest: Sequence[Any], **named: Any) -> Tensor:
        if isinstance(images, Tensor):
            return function(images.float(), *rest, **named)
        tensors = [to_tensor(image) for image in images]
        if len({tensor.shape for tensor in tensors}) == 1:
            return function(torch.stack(tensors), *rest, **named)
        parts = [function(tensor[None], *([each[at]] for each in rest), **named) for at, tensor in enumerate(tensors)]
        return torch.cat(parts)

    return scored
