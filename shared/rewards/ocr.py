"""Whether an image shows the words that its prompt puts in quotes, by a library that reads text in images.

Deliberately not here: prompts that ask for words otherwise than in quotes.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shared.errors import UserError
from shared.rewards.base import text_of

QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|(?<!\w)'([^']+)'(?!\w)")
ENGINES = ("pytesseract", "easyocr")


class OCRReward:
    """1 where an image shows the words in quotes, less for each letter that is wrong, missing or too many, down to 0.

    The distance (Levenshtein) between what is read and what is asked for, over the length of the latter; case and
    space do not count, and 0 where what is read contains it. Does not apply to a prompt without quotes.

    Args:
        engine: `pytesseract`, which needs the program tesseract, or `easyocr`; None: the first that is installed.
        language: as the engine calls it; None: English.
        read: reads a PIL image, in place of an engine.

    Raises:
        UserError: there is no engine.

    Paper: as in Flow-GRPO (Liu et al. 2025).

    Example:
        >>> reward = OCRReward(read=lambda image: "HELO")
        >>> reward([None], ['a sign that says "Hello"'])
        [0.8]
    """

    takes, differentiable = "pil", False

    def __init__(
        self, engine: str | None = None, *, language: str | None = None, read: Callable[[Any], str] | None = None
    ):
        self.read, self.__name__ = read or _engine(engine, language), "ocr"

    def __call__(self, images: Sequence[Any], prompts: Sequence[Any], **columns: Any) -> list[float | None]:
        """Scores of images.

        Args:
            images: B PIL images.
            prompts: B strings, or lists of messages, whose text counts.
            columns: the rows' other columns; not looked at.
        """
        return [self._score(image, text_of(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Any, prompt: str) -> float | None:
        asked = " ".join(next(filter(None, found)) for found in QUOTED.findall(prompt))
        wanted = _plain(asked)
        if not wanted:
            return None
        found = _plain(self.read(image))
        distance = 0 if wanted in found else edit_distance(found, wanted)
        return 1 - min(distance, len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """The letters that must be put in, left out or changed to turn one text into the other (Levenshtein)."""
    before = list(range(len(second) + 1))
    for at, letter in enumerate(first, 1):
        row = [at]
        for place, other in enumerate(second, 1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (letter != other)))
        before = row
    return before[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _engine(name: str | None, language: str | None) -> Callable[[Any], str]:
    if name is not None and name not in ENGINES:
        raise UserError(f"ocr: engine is {name!r}; allowed: {', '.join(ENGINES)}.")
    for each in [name] if name else ENGINES:
        if each == "pytesseract" and importlib.util.find_spec(each) and shutil.which("tesseract"):
            return functools.partial(_tesseract, language=language or "eng")
        if each == "easyocr" and importlib.util.find_spec(each):
            return _easy(language or "en")
    raise UserError(
        f"ocr needs {name or 'a library'} that reads text in images, which is not installed: pip install pytesseract "
        "and the program tesseract (apt install tesseract-ocr), or pip install easyocr."
    )


def _tesseract(image: Any, language: str) -> str:
    import pytesseract

    return pytesseract.image_to_string(image, lang=language)


def _easy(language: str) -> Callable[[Any], str]:
    import easyocr
    import torch

    reader = easyocr.Reader([language], gpu=torch.accelerator.is_available(), verbose=False)
    return lambda image: " ".join(reader.readtext(np.asarray(image.convert("RGB")), detail=0))
