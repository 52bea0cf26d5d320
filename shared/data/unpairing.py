"""Preference pairs as single answers: each pair becomes a good row and a bad one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.data.pairs import split_pair

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "margin")


def unpaired(rows: Any) -> Any:
    """Rows with `prompt`, `completion` and `label` in the place of preference pairs; other rows as they are.

    Args:
        rows: a data set, a list of rows, a stream, several sets by name, or None. Rows that have a `label` already, or
            no `chosen` and `rejected`, are given back untouched.

    Raises:
        DataError: pairs whose prompt cannot be told; names the row.
    """
    if rows is None or not _are_pairs(rows):
        return {name: unpaired(each) for name, each in rows.items()} if isinstance(rows, dict) else rows
    if hasattr(rows, "__len__"):
        return [single for number, row in enumerate(rows) for single in _singles(row, number)]

    def split(batch: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        pairs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        singles = [each for pair, number in zip(pairs, numbers, strict=True) for each in _singles(pair, number)]
        return {name: [single[name] for single in singles] for name in singles[0]}

    return rows.map(split, batched=True, with_indices=True, remove_columns=list(next(iter(rows))))


def _are_pairs(rows: Any) -> bool:
    first = None if isinstance(rows, dict) else next(iter(rows), None)
    return first is not None and {"chosen", "rejected"} <= set(first) and "label" not in first


def _singles(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    prompt, *answers = split_pair(row, number)
    others = {name: value for name, value in row.items() if name not in PAIR_COLUMNS}
    labels = (True, False)
    return [{**others, "prompt": prompt, "completion": a, "label": n} for a, n in zip(answers, labels, strict=True)]
