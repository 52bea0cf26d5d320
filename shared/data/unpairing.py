"""Preference pairs as single answers: each pair becomes a good row and a bad one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.data.pairs import split_pair
from shared.data.schema import Kind, check_rows

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "margin")


def unpaired(rows: Any, on_bad_row: str = "error") -> Any:
    """Rows with `prompt`, `completion` and `label` in the place of preference pairs; other rows as they are.

    Args:
        rows: a data set, a list of rows, a stream, several sets by name, or None. Rows that have a `label` already, or
            no `chosen` and `rejected`, are given back untouched.
        on_bad_row: `error`, or `skip` to leave out pairs that cannot be used.

    Raises:
        DataError: pairs that cannot be used; names their rows.
    """
    if isinstance(rows, dict):
        return {name: unpaired(each, on_bad_row) for name, each in rows.items()}
    if rows is None or not _are_pairs(rows):
        return rows
    kept = check_rows(rows, Kind.PREFERENCE, on_bad_row=on_bad_row, what="paired").kept
    if hasattr(rows, "__len__"):
        numbers = range(len(rows)) if kept is None else kept
        return [single for number in numbers for single in _singles(rows[number], number)]

    def split(batch: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        pairs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        singles = [each for pair, number in zip(pairs, numbers, strict=True) for each in _singles(pair, number)]
        return {name: [single[name] for single in singles] for name in singles[0]}

    return rows.map(split, batched=True, with_indices=True, remove_columns=list(next(iter(rows))))


def _are_pairs(rows: Any) -> bool:
    first = next(iter(rows), None)
    return isinstance(first, Mapping) and {"chosen", "rejected"} <= set(first) and "label" not in first


def _singles(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    prompt, *answers = split_pair(row, number)
    others = {name: value for name, value in row.items() if name not in PAIR_COLUMNS}
    labels = (True, False)
    return [{**others, "prompt": prompt, "completion": a, "label": n} for a, n in zip(answers, labels, strict=True)]
