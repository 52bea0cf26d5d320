"""Images made worse, of their own size: what a model that looks at them must tell from the right ones.

What is drawn depends on the seed, the row and the image's place in it alone: a run can be done again, and what a
reference says of these images can be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SMALLEST, LARGEST = 0.01, 0.2  # share of an image that a crop keeps, as in mDPO
GREY = (127, 127, 127)


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A piece of 1 to 20 % of the image, of its shape, made as large as the whole."""
    side = np.sqrt(random.uniform(SMALLEST, LARGEST))
    width, height = (max(1.0, side * length) for length in image.size)
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A tenth of the image's variation under normal noise of 64 around grey."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    drawn = random.normal(0.0, 64.0, pixels.shape)
    return Image.fromarray((127.0 + 0.1 * (pixels - 127.0) + drawn).clip(0, 255).astype(np.uint8))


def blank(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Plain grey."""
    return Image.new("RGB", image.size, GREY)


CORRUPTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "crop": crop,
    "noise": noise,
    "blank": blank,
}


@dataclass(frozen=True)
class Corruption:
    """Makes an image worse.

    Args:
        kind: a key of CORRUPTIONS.
        seed: of what is drawn.
    """

    kind: str
    seed: int = 0

    def __call__(self, image: Image.Image, row: int, place: int) -> Image.Image:
        """The image of row `row` at place `place`, corrupted: the same for the same image at each call."""
        random = np.random.default_rng([self.seed, row % 2**32, place])
        return CORRUPTIONS[self.kind](image, random)
