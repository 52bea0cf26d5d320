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
    return _dataset(questions, {"messages": [[_asked(q), _answered(q)] for q in questions]})


def to_prompts(questions: Sequence[Question]) -> Dataset:
    """Rows of `images`, `prompt` (the user's turn), `solution` (the answer as text), `kind`, likewise in memory."""
    return _dataset(questions, {"prompt": [[_asked(q)] for q in questions], "solution": [q.answer for q in questions]})


def _dataset(questions: Sequence[Question], columns: dict[str, list]) -> Dataset:
    from datasets import Dataset, Features, Image, List, Value

    turns = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    types = {"images": List(Image()), "messages": turns, "prompt": turns}
    columns = {
        "images": [[{"bytes": q.png, "path": None}] for q in questions],
        **columns,
        "kind": [q.kind for q in questions],
    }
    features = Features({name: types.get(name, Value("string")) for name in columns})
    return Dataset.from_dict(columns, features=features)


def _asked(question: Question) -> dict:
    return {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question.text}]}


def _answered(question: Question) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
