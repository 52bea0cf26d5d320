"""`builtin/digits`: real handwritten digits, 8 x 8 pixels, 1,797 of them, shown at 48 x 48.

The pictures are in `data/digits.parquet`; `data/DIGITS_LICENSE.txt` says where they come from.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from shared.builtin.rows import IMAGE_SIZE, Question, png, to_dataset

if TYPE_CHECKING:
    from datasets import Dataset

PATH = Path(__file__).parent / "data" / "digits.parquet"
SIDE = 8  # pixels
LEVELS = 16  # a stored pixel is 0 (background) to 16 (ink)
QUESTIONS = ("Which digit is this?", "What digit is written here?", "Read the digit.")


def load(split: str) -> Dataset:
    """The "train" (1,437) or "test" (360) digits, one question each."""
    rng = random.Random(f"digits {split}")
    pixels_N88, labels = read(split)
    return to_dataset(
        [
            Question(png(enlarge(pixels_88)), rng.choice(QUESTIONS), str(label), "digit")
            for pixels_88, label in zip(pixels_N88, labels, strict=True)
        ]
    )


def read(split: str) -> tuple[np.ndarray, list[int]]:
    """The stored digits of a split: pixels (N, 8, 8) uint8 in 0..16 and labels in 0..9."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(PATH, filters=[("split", "=", split)])
    pixels = np.frombuffer(b"".join(table["pixels"].to_pylist()), np.uint8)
    return pixels.reshape(-1, SIDE, SIDE), table["label"].to_pylist()


def enlarge(pixels_88: np.ndarray) -> np.ndarray:
    """A stored digit as a grey picture (48, 48, 3) uint8, light on black."""
    small = Image.fromarray((pixels_88.astype(np.uint16) * 255 // LEVELS).astype(np.uint8))
    return np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB"))
