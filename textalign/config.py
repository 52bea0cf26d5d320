"""The base of the text trainers' configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.trainers.config import FOLLOWED, AlignConfig


@dataclass
class TextConfig(AlignConfig):
    """AlignConfig of trainers whose rows are turned into tokens before training, so that their lengths are known."""

    followed: ClassVar[dict[str, tuple]] = {
        **FOLLOWED,
        "train_sampling_strategy": ("group_by_length", "random", "sequential"),
    }
