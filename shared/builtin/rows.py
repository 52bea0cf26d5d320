"""The row format that the built-in visual-question data sets share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

IMAGE_SIZE = 48  # pixels, height and width; what the built-in models take


@dataclass(frozen=True)
class Question:
    """One question about one picture, e.g. `Question(png, "Where is the circle?", "top left", "where")`."""

    png: bytes
    text: str
    answer: str
    kind: str


def png(pixels_HW3: np.ndarray) -> bytes:
    """Encode a uint8 picture (H, W, 3) or (H, W); fast rather than small, since it stays in memory."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def to_dataset(questions: Sequence[Question]) -> Dataset:
    """Rows of `images`, `messages`, `kind` in memory: nothing is written to the data set cache."""
    from datasets import Dataset, Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "images": List(Image()),
            "messages": List({"role": Value("string"), "content": List(part)}),
            "kind": Value("string"),
        }
    )
    columns = {
        "images": [[{"bytes": q.png, "path": None}] for q in questions],
        "messages": [_messages(q) for q in questions],
        "kind": [q.kind for q in questions],
    }
    return Dataset.from_dict(columns, features=features)


def _messages(question: Question) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
    ]
