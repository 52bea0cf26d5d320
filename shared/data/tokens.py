"""Tokenised rows: flat arrays with the places of each row in them, in memory or mapped from a file.

Deliberately not here: how text becomes tokens (tokenise.py), how rows are packed (packing.py), padding (collators.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shared.data.rows import ROW, Share

NOTE = "__note__"  # what was done to a row on the way to its tokens, in words; only on rows of a stream

TYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "prompt_ids": np.int32,
    "chosen_ids": np.int32,
    "rejected_ids": np.int32,
    "completion_ids": np.int32,
    "lengths": np.int32,
    "step_ends": np.int32,
    "learnt": np.bool_,
    "step_labels": np.bool_,
    "label": np.bool_,
    "margin": np.float32,
}


@dataclass
class Ragged:
    """Rows of different lengths in one flat array: row i is `values[starts[i] : stops[i]]`.

    Example:
        `Ragged.of_lengths(np.array([5, 6, 7]), [2, 1])` holds the rows `[5, 6]` and `[7]`.
    """

    values: np.ndarray
    starts: np.ndarray  # (N,) int64
    stops: np.ndarray  # (N,) int64

    @classmethod
    def of_lengths(cls, values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> Ragged:
        """Rows that lie one after the other in `values`."""
        stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
        return cls(values, np.concatenate([np.zeros(min(1, len(stops)), np.int64), stops[:-1]]), stops)

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence], dtype: Any = None) -> Ragged:
        """Rows given as lists, as arrays, or as bytes of zeros and ones, which become booleans."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if rows and isinstance(rows[0], (bytes, bytearray)):
            values = np.frombuffer(b"".join(rows), np.bool_)
        elif rows and isinstance(rows[0], np.ndarray):
            values = np.concatenate(rows).astype(dtype or rows[0].dtype, copy=False)
        else:
            values = np.fromiter(chain.from_iterable(rows), dtype or np.int32, int(lengths.sum()))
        return cls.of_lengths(values, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.stops[index]]

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)` values of each row."""
        return self.stops - self.starts

    def select(self, indices: np.ndarray) -> Ragged:
        """Some of the rows, in the order given; the values are shared."""
        return Ragged(self.values, self.starts[indices], self.stops[indices])

    def compact(self) -> Ragged:
        """The same rows, one after the other in an array of their own."""
        lengths = self.lengths
        return Ragged.of_lengths(self.values[spread(self.starts, lengths)], lengths)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file is opened again where the rows are unpickled: pickled, it would be copied into memory.
        name = getattr(self.values, "filename", None)
        values = str(name) if name is not None and isinstance(self.values.base, mmap.mmap) else self.values
        return {"values": values, "starts": self.starts, "stops": self.stops}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.values, str):
            self.values = np.load(self.values, mmap_mode="r")


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places `start, start + 1, …` of all ranges, one after the other: `[0, 7], [2, 3]` gives 0, 1, 7, 8, 9."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(total, dtype=np.int64)


class TokenTable(Dataset):
    """Map-style tokenised rows.

    A row is a dict of numpy arrays and scalars, with its number in the data set as given under `ROW`. By kind:
    supervised kinds and prompts alone have `input_ids` int32 and `learnt` bool, packed rows also the `lengths` of
    their documents; preference has `prompt_ids`, `chosen_ids`, `rejected_ids` (and `margin`); unpaired preference
    `prompt_ids`, `completion_ids`, `label`; stepwise `input_ids`, `step_ends` (positions) and `step_labels`.

    Args:
        columns: name -> ragged column, or an array `(N, ...)` of one value a row.
        rows: `(N,)` the rows' numbers; 0, 1, … where None.
    """

    def __init__(self, columns: Mapping[str, Ragged | np.ndarray], rows: np.ndarray | None = None):
        self.columns = dict(columns)
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns of different lengths: {sizes}")
        count = next(iter(sizes.values()), 0)
        self.rows = np.arange(count, dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(self.rows) != count:
            raise ValueError(f"{len(self.rows)} row numbers for {count} rows")

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]], rows: Sequence[int] | None = None) -> TokenTable:
        """A table of rows as dicts, all with the same names; lists, arrays and bytes become ragged columns."""
        columns: dict[str, Ragged | np.ndarray] = {}
        for name in records[0] if records else ():
            values = [record[name] for record in records]
            dtype = TYPES.get(name)
            ragged = isinstance(values[0], (list, tuple, bytes, bytearray, np.ndarray))
            columns[name] = Ragged.of_rows(values, dtype) if ragged else np.array(values, dtype)
        return cls(columns, None if rows is None else np.asarray(rows, dtype=np.int64))

    @classmethod
    def join(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """The rows of several tables with the same columns."""
        filled = [table for table in tables if len(table)]
        if len(filled) < 2:
            return filled[0] if filled else cls({})
        columns: dict[str, Ragged | np.ndarray] = {}
        for name, first in filled[0].columns.items():
            parts = [table.columns[name] for table in filled]
            if isinstance(first, Ragged):
                parts = [part.compact() if not _is_compact(part) else part for part in parts]
                values = np.concatenate([part.values for part in parts])
                columns[name] = Ragged.of_lengths(values, np.concatenate([part.lengths for part in parts]))
            else:
                columns[name] = np.concatenate(parts)
        return cls(columns, np.concatenate([table.rows for table in filled]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {ROW: int(self.rows[index]), **{name: column[index] for name, column in self.columns.items()}}

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Several rows, as torch's data loader asks for a batch."""
        return [self[index] for index in indices]

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)` int64, the tokens of each row, of all its texts together."""
        total = np.zeros(len(self), dtype=np.int64)
        for name, column in self.columns.items():
            if name.endswith("_ids") and isinstance(column, Ragged):
                total += column.lengths
        return total

    def share(self, rank: int, processes: int) -> Share:
        """The rows that one of several processes evaluates; see shared.data.rows.Rows.share."""
        return Share(self, rank, processes)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenTable:
        """Some of the rows, in the order given; the tokens are shared, not copied."""
        at = np.asarray(indices, dtype=np.int64)
        columns = {n: c.select(at) if isinstance(c, Ragged) else c[at] for n, c in self.columns.items()}
        return TokenTable(columns, self.rows[at])

    def with_column(self, name: str, values: Ragged | np.ndarray | Sequence) -> TokenTable:
        """The table with one more column: ragged, a list of lists or of arrays, or one value a row.

        Raises:
            ValueError: not one value a row.
        """
        if not isinstance(values, (Ragged, np.ndarray)):
            ragged = len(values) > 0 and isinstance(values[0], (list, tuple, np.ndarray))
            first = np.asarray(values[0]) if ragged else None
            values = Ragged.of_rows(values, first.dtype) if ragged else np.asarray(values)
        return TokenTable({**self.columns, name: values}, self.rows)


def _is_compact(column: Ragged) -> bool:
    """Whether the rows lie one after the other and fill the flat array."""
    starts, stops = column.starts, column.stops
    return (
        len(starts) > 0
        and starts[0] == 0
        and stops[-1] == len(column.values)
        and bool((starts[1:] == stops[:-1]).all())
    )
