"""What the built-in text data sets share: turns of a chat, and which split something belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 8  # one name, problem or module in so many is held out


def user(text: str) -> dict[str, str]:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}


def split_of(key: str) -> str:
    """Which split whatever is called `key` belongs to: a property of the key alone, so that splits are disjoint."""
    digest = blake2b(key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % HELD_OUT == 0 else "train"


def to_dataset(columns: Mapping[str, list[Any]]) -> Dataset:
    """Columns of equal length as a data set in memory: nothing is written to the data set cache."""
    from datasets import Dataset

    return Dataset.from_dict(dict(columns))
