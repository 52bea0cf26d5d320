"""The base of the text trainers' configurations, and what scripts written for TRL give it under other names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.trainers.config import FOLLOWED, AlignConfig

# what other versions of these configurations take -> what to do instead
NOT_TAKEN = {
    "dataset_batch_size": "Leave it out: rows are turned into tokens in batches of a fixed size.",
    "num_of_sequences": "Leave it out: packed rows are made before training, max_length tokens each.",
    "chars_per_token": "Leave it out: packed rows are made of tokens, not of characters.",
    "generate_during_eval": "Leave it out: eval_answers held-out rows are answered before and after training.",
}


@dataclass
class TextConfig(AlignConfig):
    """AlignConfig of trainers whose rows are turned into tokens before training, so that their lengths are known."""

    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN
    followed: ClassVar[dict[str, tuple]] = {
        **FOLLOWED,
        "train_sampling_strategy": ("group_by_length", "random", "sequential"),
    }

    def _check_options(self) -> None:
        super()._check_options()
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None  # no device here wants rows of certain lengths
