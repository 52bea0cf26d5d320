"""What is wrong with a row of text before a token is made of it, and what is odd about many rows together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from shared.data.conversation import Conversation, media, read_conversation, type_name
from shared.data.pairs import read_pair
from shared.errors import DataError

_CONTENT = (
    *("text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "completions", "input_ids"),
    *("label", "labels"),
)


def check_text(row: Mapping[str, Any], index: int, field: str) -> None:
    """Raise DataError where a row's plain text is none, or empty."""
    if not isinstance(row.get(field), str) or not row[field].strip():
        found = "empty" if isinstance(row.get(field), str) else type_name(row.get(field))
        raise DataError(f"row {index}: {field} is {found}, expected a string that is not empty")


def check_pair(row: Mapping[str, Any], index: int) -> Conversation:
    """The prompt with its chosen answer. Raises DataError where a preference row cannot be used."""
    chosen, rejected = read_pair(row, index)
    if chosen.messages == rejected.messages:
        raise DataError(f"row {index}: chosen and rejected are the same: there is nothing to prefer")
    margin = row.get("margin")
    number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if margin is not None and not (number and math.isfinite(margin)):
        raise DataError(f"row {index}: margin is {margin!r}, expected a finite number")
    return chosen


def check_unpaired(row: Mapping[str, Any], index: int) -> Conversation:
    """The prompt with its answer. Raises DataError where an unpaired preference row cannot be used."""
    if not is_truth(row.get("label")):
        raise DataError(f"row {index}: label is {row.get('label')!r}, expected true or false")
    return read_conversation(row, index, "prompt", "completion")


def check_steps(row: Mapping[str, Any], index: int) -> Conversation:
    """The prompt. Raises DataError where a stepwise row cannot be used."""
    steps, labels = row.get("completions"), row.get("labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        sizes = [len(value) if isinstance(value, list) else type_name(value) for value in (steps, labels)]
        raise DataError(
            f"row {index}: completions has {sizes[0]} and labels {sizes[1]}, expected lists of one length, not empty"
        )
    for at, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip():
            found = "empty" if isinstance(step, str) else type_name(step)
            raise DataError(f"row {index}: completions[{at}] is {found}, expected a string that is not empty")
        if not is_truth(label):
            raise DataError(f"row {index}: labels[{at}] is {label!r}, expected true or false")
    return read_conversation(row, index, "prompt", None)


def is_truth(value: Any) -> bool:
    """Whether a label is true or false, or 1 or 0."""
    return isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1))


def check_tokens(row: Mapping[str, Any], index: int, loss_on: str = "all", vocabulary: int = 2**31) -> None:
    """Raise DataError where a tokenised row's `input_ids`, `labels` or masks cannot be used.

    Args:
        row: with lists or arrays of numbers.
        index: the row's number, for errors.
        loss_on: what is learnt, which decides the mask that is needed.
        vocabulary: how many token numbers there are.
    """
    ids = row.get("input_ids")
    if not hasattr(ids, "__len__") or isinstance(ids, str) or not len(ids):
        found = "empty" if hasattr(ids, "__len__") and not isinstance(ids, str) else type_name(ids)
        raise DataError(f"row {index}: input_ids is {found}, expected a list of token numbers")
    if any(isinstance(token, bool) or not isinstance(token, Integral) or token < 0 for token in listed(ids)):
        raise DataError(f"row {index}: input_ids holds something that is no token number")
    if max(listed(ids)) >= vocabulary:
        raise DataError(
            f"row {index}: input_ids holds {max(listed(ids))}, but the tokenizer's numbers end at {vocabulary - 1}: "
            "the rows were made with another tokenizer"
        )
    for name in ("labels", "completion_mask", "assistant_masks"):
        values = row.get(name)
        if values is None:
            continue
        if not hasattr(values, "__len__") or isinstance(values, (str, Mapping)):
            raise DataError(f"row {index}: {name} is {type_name(values)}, expected a list, as long as input_ids")
        if len(values) != len(ids):
            raise DataError(f"row {index}: {name} has {len(values)} values, input_ids {len(ids)}: expected as many")
    labels = row.get("labels")
    if labels is not None:
        if any(label not in (token, -100) for label, token in zip(listed(labels), listed(ids), strict=True)):
            raise DataError(
                f"row {index}: labels differ from input_ids elsewhere than where they are -100; they are to be those "
                "of the tokens themselves, not shifted"
            )
        return
    needed = {"completion": "completion_mask", "assistant": "assistant_masks"}.get(loss_on)
    if needed and row.get(needed) is None:
        raise DataError(f"row {index}: the loss is on the {loss_on}, but the row has neither labels nor {needed}")


def listed(values: Any) -> Any:
    """The values of an array as Python's own."""
    return values.tolist() if hasattr(values, "tolist") else values


class Census:
    """What is odd about many rows together: nothing that makes a row bad, but something to know before training."""

    def __init__(self, text_field: str = "text") -> None:
        self._columns = (text_field, *_CONTENT)
        self.rows = self.duplicates = self.desirable = self.labelled = 0
        self._seen: set[int] = set()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row that can be used."""
        self.rows += 1
        if "label" in row and is_truth(row["label"]):
            self.labelled += 1
            self.desirable += bool(row["label"])
        if media(row, "image") or media(row, "video"):
            return  # pictures are not compared, so nothing is known about such a row
        values = (row.get(name) for name in self._columns)
        content = hash(tuple(value if isinstance(value, (str, bool)) else repr(value) for value in values))
        self.duplicates += content in self._seen
        self._seen.add(content)

    def warnings(self) -> list[str]:
        """What was found, a line each."""
        found = []
        if self.duplicates:
            share = self.duplicates / self.rows
            found.append(f"{self.duplicates:,} rows ({share:.1%}) are exact copies of rows before them")
        if self.labelled == self.rows and self.rows > 1 and self.desirable in (0, self.rows):
            only = "true" if self.desirable else "false"
            found.append(f"all labels are {only}: there is nothing to tell good answers from bad ones by")
        return found
