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
    """A question about pictures, e.g. `Question(png, "Where is the circle?", "top left", "where")`.

    Attributes:
        png: the picture.
        text: what is asked; each `<image>` in it is the place of a picture. Without any the picture comes first.
        answer: the one right answer.
        kind: what accuracy is reported by.
        more: the second picture and those after it.
    """

    png: bytes
    text: str
    answer: str
    kind: str
    more: tuple[bytes, ...] = ()


def png(pixels_HW3: np.ndarray) -> bytes:
    """Encode a uint8 picture (H, W, 3) or (H, W); fast rather than small, since it stays in memory."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def to_dataset(questions: Sequence[Question]) -> Dataset:
    """Rows of `images`, `messages`, `kind` in memory: nothing is written to the data set cache."""
    return _dataset(questions, {"messages": [[_asked(q), _answered(q.answer)] for q in questions]})


def to_prompts(questions: Sequence[Question]) -> Dataset:
    """Rows of `images`, `prompt` (the user's turn), `solution` (the answer as text), `kind`, likewise in memory."""
    return _dataset(questions, {"prompt": [[_asked(q)] for q in questions], "solution": [q.answer for q in questions]})


def to_preferences(questions: Sequence[Question], rejected: Sequence[str], columns: dict[str, list]) -> Dataset:
    """Rows of `images`, `prompt`, `chosen` (the answer), `rejected` (each a chat), `columns`, `kind`, likewise.

    Args:
        rejected: a worse answer to each question.
        columns: further columns of lists of texts.
    """
    turns = {
        "prompt": [[_asked(q)] for q in questions],
        "chosen": [[_answered(q.answer)] for q in questions],
        "rejected": [[_answered(text)] for text in rejected],
    }
    return _dataset(questions, {**turns, **columns})


def _dataset(questions: Sequence[Question], columns: dict[str, list]) -> Dataset:
    from datasets import Dataset, Features, Image, List, Value

    turns = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    types = {"images": List(Image()), **dict.fromkeys(("messages", "prompt", "chosen", "rejected"), turns)}
    columns = {
        "images": [[{"bytes": data, "path": None} for data in (q.png, *q.more)] for q in questions],
        **columns,
        "kind": [q.kind for q in questions],
    }
    texts = {True: List(Value("string")), False: Value("string")}
    features = Features({k: types.get(k) or texts[isinstance(values[0], list)] for k, values in columns.items()})
    return Dataset.from_dict(columns, features=features)


def _asked(question: Question) -> dict:
    content = []
    for piece in (question.text if "<image>" in question.text else f"<image>{question.text}").split("<image>"):
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        content.append({"type": "image", "text": None})
    return {"role": "user", "content": content[:-1]}


def _answered(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
