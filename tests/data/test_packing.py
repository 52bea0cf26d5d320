"""Packing: what lies in which row, by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest

from shared.data.packing import STRATEGIES, Piece, pack, pack_table, plan
from shared.data.rows import ROW
from shared.data.tokens import TokenTable
from shared.errors import UserError


def test_best_fit_decreasing_by_hand():
    # 8, 6 and 5 open rows; 4 fills that of 6; 3 joins 5; 2 fits in both rows that are left
    assert pack([4, 8, 2, 5, 6, 3], 10, "bfd") == [
        [Piece(1, 0, 8)],
        [Piece(4, 0, 6), Piece(0, 0, 4)],
        [Piece(3, 0, 5), Piece(5, 0, 3), Piece(2, 0, 2)],
    ]


def test_the_row_with_the_least_room_is_taken():
    rows = pack([7, 6, 3], 10, "bfd")
    assert rows == [[Piece(0, 0, 7), Piece(2, 0, 3)], [Piece(1, 0, 6)]]


def test_too_long_documents_are_cut_or_divided():
    assert pack([12, 3], 5, "bfd") == [[Piece(0, 0, 5)], [Piece(1, 0, 3)]]
    assert pack([12, 3], 5, "bfd_split") == [
        [Piece(0, 0, 5)],
        [Piece(0, 5, 10)],
        [Piece(1, 0, 3), Piece(0, 10, 12)],
    ]
    cut = plan([12, 3], 5, "bfd")
    assert (cut.cut, cut.lost, cut.divided) == (1, 7, 0) and "1 longer ones are cut: 7 tokens (46.7%)" in cut.text("x")
    divided = plan([12, 3], 5, "bfd_split")
    assert (divided.cut, divided.divided) == (0, 1) and "1 are divided" in divided.text("x")


def test_wrapped_by_hand():
    assert pack([3, 4, 6], 5, "wrapped") == [
        [Piece(0, 0, 3), Piece(1, 0, 2)],
        [Piece(1, 2, 4), Piece(2, 0, 3)],
        [Piece(2, 3, 6)],
    ]
    assert pack([5, 5], 5, "wrapped") == [[Piece(0, 0, 5)], [Piece(1, 0, 5)]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_once_and_no_row_too_long(strategy):
    lengths = np.random.default_rng(0).integers(0, 90, 300)
    rows = pack(lengths, 64, strategy)
    assert max(sum(piece.stop - piece.start for piece in row) for row in rows) <= 64
    seen = np.zeros((300, 90), dtype=int)
    for row in rows:
        for piece in row:
            assert piece.stop > piece.start
            seen[piece.row, piece.start : piece.stop] += 1
    for document, length in enumerate(lengths):
        kept = min(length, 64) if strategy == "bfd" else length
        assert (seen[document, :kept] == 1).all() and not seen[document, kept:].any()
    if strategy == "bfd":
        assert len({piece.row for row in rows for piece in row}) == sum(map(len, rows))
    tokens = lengths.sum() if strategy != "bfd" else np.minimum(lengths, 64).sum()
    assert len(rows) <= 1.1 * tokens / 64 + 1


def documents() -> TokenTable:
    records = [
        {"input_ids": list(range(10 * row, 10 * row + length)), "learnt": b"\x00" + b"\x01" * (length - 1)}
        for row, length in enumerate([3, 5, 2], start=1)
    ]
    return TokenTable.of_records(records, rows=[4, 5, 6])


def test_packed_rows_know_their_documents():
    table = pack_table(documents(), 5, "bfd")
    assert [row[ROW] for row in table.__getitems__([0, 1])] == [5, 4]
    assert table[1]["input_ids"].tolist() == [10, 11, 12, 30, 31]
    assert table[1]["lengths"].tolist() == [3, 2]
    assert table[1]["learnt"].tolist() == [False, True, True, False, True]
    assert table.lengths.tolist() == [5, 5]


def test_a_piece_within_a_document_begins_unlearnt():
    table = pack_table(documents(), 4, "wrapped")
    assert [row["input_ids"].tolist() for row in table] == [[10, 11, 12, 20], [21, 22, 23, 24], [30, 31]]
    assert table[1]["learnt"].tolist() == [False, True, True, True]
    assert documents()[1]["learnt"].tolist() == [False, True, True, True, True]


def test_a_selection_is_packed_by_its_own_rows():
    table = pack_table(documents().select([2, 0]), 5, "bfd")
    assert table[0]["input_ids"].tolist() == [10, 11, 12, 30, 31]


def test_what_cannot_be_packed():
    with pytest.raises(UserError, match="allowed: bfd, bfd_split, wrapped"):
        pack([1], 5, "ffd")
    with pytest.raises(UserError, match="Set max_length"):
        pack([1], 0)
    assert [pack([], 5, strategy) for strategy in STRATEGIES] == [[], [], []]
