"""A data set as the trainers see it: rows that know their number, and the share of one process in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

ROW = "__row__"  # the row's number in the data set as the user gave it, for messages
PADDING = "__padding__"  # True on a row that only fills up a process's share: nothing of it is counted


class Rows(Dataset):
    """Map-style rows, as dicts with their own number under `ROW`.

    Args:
        dataset: a datasets.Dataset or any sequence of dicts.
        kept: the row numbers to use, in order; all where None.
        left_out: row number -> why it is not among them.
    """

    def __init__(self, dataset: Any, kept: Sequence[int] | None = None, left_out: Mapping[int, str] | None = None):
        self.dataset = dataset
        self.kept = kept
        self.left_out = dict(left_out or {})

    def __len__(self) -> int:
        return len(self.dataset) if self.kept is None else len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index if self.kept is None else int(self.kept[index])
        return {ROW: number, **self.dataset[number]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows in one read, as torch's data workers ask for a batch."""
        numbers = indices if self.kept is None else [int(self.kept[index]) for index in indices]
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        return [{ROW: number, **row} for row, number in zip(self.dataset.__getitems__(numbers), numbers, strict=True)]

    def share(self, rank: int, processes: int) -> Share:
        """The rows that one of several processes evaluates."""
        return Share(self, rank, processes)


class Extended(Rows):
    """Rows with more columns, which were made for them.

    Args:
        rows: the rows.
        columns: name -> one value a row, by the row's place.
    """

    def __init__(self, rows: Rows, columns: Mapping[str, Sequence[Any]]):
        super().__init__(rows, left_out=rows.left_out)
        self.columns = dict(columns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], **{name: column[index] for name, column in self.columns.items()}}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__(indices)
        made = ({name: column[index] for name, column in self.columns.items()} for index in indices)
        return [{**row, **own} for row, own in zip(rows, made, strict=True)]


class Share(Dataset):
    """Every `processes`-th row from `rank` on, filled up with marked rows so that all processes have equally many.

    Processes that shard a model must call it equally often; marked rows keep the sums exact.
    """

    def __init__(self, rows: Rows, rank: int, processes: int):
        self.rows, self.rank, self.processes = rows, rank, processes

    def __len__(self) -> int:
        return -(-len(self.rows) // self.processes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = index * self.processes + self.rank
        if at < len(self.rows):
            return self.rows[at]
        return {**self.rows[len(self.rows) - 1], PADDING: True}


def with_row_numbers(stream: Any) -> Any:
    """A datasets.IterableDataset whose rows know their number in the file, of those read at once, they stand in."""
    return stream.map(lambda row, number: {**row, ROW: number}, with_indices=True)
