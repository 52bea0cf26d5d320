"""Several documents in one row, so that no step is spent on padding.

Strategies:
    bfd: best-fit decreasing. No document is divided; one longer than a row loses its end, and is counted.
    bfd_split: the same, but a document longer than a row is divided into pieces, and nothing is lost.
    wrapped: all documents one after the other, cut every `capacity` tokens.

How attention keeps documents apart is not decided here: a packed row has the `lengths` of its documents.
Best-fit decreasing after Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shared.data.tokens import Ragged, TokenTable, spread
from shared.errors import UserError

STRATEGIES = ("bfd", "bfd_split", "wrapped")


class Piece(NamedTuple):
    """Tokens `start` to `stop` of document `row`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Packing:
    """Which documents lie in which row, as arrays.

    Attributes:
        pieces: `(K, 3)` int64: document, start, stop; those of a row one after the other.
        counts: `(R,)` pieces of each row.
        capacity: tokens a row can hold.
        cut: how many documents lost their end.
        lost: how many tokens they lost.
        divided: how many documents lie in several pieces.
    """

    pieces: np.ndarray
    counts: np.ndarray
    capacity: int
    cut: int = 0
    lost: int = 0
    divided: int = 0

    def text(self, what: str) -> str:
        """What packing did, in a line."""
        tokens = int((self.pieces[:, 2] - self.pieces[:, 1]).sum())
        rows, documents = len(self.counts), len(np.unique(self.pieces[:, 0]))
        filled = tokens / max(1, rows * self.capacity)
        said = f"{what}: {documents:,} documents in {rows:,} rows of {self.capacity:,} tokens, {filled:.1%} filled"
        if self.cut:
            said += (
                f"; {self.cut:,} longer ones are cut: {self.lost:,} tokens ({self.lost / (tokens + self.lost):.1%})"
            )
        if self.divided:
            said += f"; {self.divided:,} are divided"
        return said


def plan(lengths: Sequence[int] | np.ndarray, capacity: int, strategy: str = "bfd") -> Packing:
    """Decide which documents share a row.

    Args:
        lengths: `(N,)` tokens of each document; empty ones are in no row.
        capacity: tokens a row can hold.
        strategy: one of STRATEGIES.

    Raises:
        UserError: an unknown strategy, or a capacity below 1.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"packing strategy {strategy!r}; allowed: {', '.join(STRATEGIES)}.")
    if capacity < 1:
        raise UserError(f"A packed row holds {capacity} tokens; allowed: 1 or more. Set max_length.")
    lengths = np.asarray(lengths, dtype=np.int64)
    if strategy == "wrapped":
        return _wrapped(lengths, capacity)
    long = lengths > capacity
    if strategy == "bfd":
        pieces = np.stack([np.arange(len(lengths)), np.zeros_like(lengths), np.minimum(lengths, capacity)], axis=1)
        lost = int((lengths - capacity)[long].sum())
        return _best_fit(pieces, capacity, cut=int(long.sum()), lost=lost)
    counts = -(-lengths // capacity)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = spread(np.zeros_like(counts), counts) * capacity
    pieces = np.stack([documents, starts, np.minimum(starts + capacity, lengths[documents])], axis=1)
    return _best_fit(pieces, capacity, divided=int(long.sum()))


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, strategy: str = "bfd") -> list[list[Piece]]:
    """The pieces of each packed row; see `plan`.

    >>> pack([3, 5, 2], capacity=5)
    [[Piece(row=1, start=0, stop=5)], [Piece(row=0, start=0, stop=3), Piece(row=2, start=0, stop=2)]]
    """
    packing = plan(lengths, capacity, strategy)
    pieces = [Piece(*piece) for piece in packing.pieces.tolist()]
    stops = np.cumsum(packing.counts).tolist()
    return [pieces[stop - count : stop] for stop, count in zip(stops, packing.counts.tolist(), strict=True)]


def pack_table(table: TokenTable, capacity: int, strategy: str = "bfd") -> TokenTable:
    """Packed rows of `input_ids`, `learnt`, and `lengths` of the documents in them; see `plan`.

    A packed row's number is its first document's. The first token of each document or piece is not learnt: within
    the document nothing stands before it.
    """
    return packed(table, plan(table.columns["input_ids"].lengths, capacity, strategy))


def packed(table: TokenTable, packing: Packing) -> TokenTable:
    """The rows that a plan makes of a table; see `pack_table`."""
    documents, starts, stops = packing.pieces.T
    lengths = stops - starts
    stops_of_rows = np.cumsum(packing.counts)
    tokens = np.diff(np.cumsum(lengths)[stops_of_rows - 1], prepend=0)
    columns = {}
    for name in ("input_ids", "learnt"):
        column = table.columns[name]
        values = column.values[spread(column.starts[documents] + starts, lengths)]
        columns[name] = Ragged.of_lengths(values, tokens)
    columns["learnt"].values[np.cumsum(lengths) - lengths] = False
    columns["lengths"] = Ragged.of_lengths(lengths.astype(np.int32), packing.counts)
    return TokenTable(columns, table.rows[documents[stops_of_rows - packing.counts]])


def _wrapped(lengths: np.ndarray, capacity: int) -> Packing:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Every end of a document and every end of a row ends a piece.
    edges = np.union1d(ends, np.append(np.arange(capacity, total, capacity), total)).astype(np.int64)
    edges = edges[edges > 0]
    begins = np.concatenate([[0], edges[:-1]])[: len(edges)].astype(np.int64)
    documents = np.searchsorted(ends, begins, side="right")
    offset = (ends - lengths)[documents]
    pieces = np.stack([documents, begins - offset, edges - offset], axis=1)
    rows = begins // capacity
    divided = int((np.bincount(documents, minlength=len(lengths)) > 1).sum())
    return Packing(pieces, np.bincount(rows), capacity, divided=divided)


def _best_fit(pieces: np.ndarray, capacity: int, **counts: int) -> Packing:
    """Put each piece, the longest first, into the row with the least room that it fits in."""
    sizes = pieces[:, 2] - pieces[:, 1]
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> rows that have it
    rooms = 0  # bit r is set where some row has room r: the least sufficient room is its lowest bit from a size on
    rows: list[list[int]] = []
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        left = room - size
        if left:
            if not rows_with[left]:
                rooms |= 1 << left
            rows_with[left].append(row)
    at = np.fromiter((piece for row in rows for piece in row), np.int64, len(order))
    return Packing(pieces[at], np.fromiter(map(len, rows), np.int64, len(rows)), capacity, **counts)
