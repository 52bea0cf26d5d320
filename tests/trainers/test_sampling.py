"""The order of the rows: each once an epoch, the same by seed and epoch, filled up with rows that count nothing."""

import numpy as np
import pytest

from shared.data.rows import PADDING, ROW, Rows
from shared.trainers.sampling import Filled, TrainingOrder


class WithLengths(Rows):
    lengths = np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 10])


ROWS = WithLengths([{"text": str(i)} for i in range(10)])


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_real_rows_come_once_and_in_one_order_for_any_number_of_processes(strategy):
    alone = TrainingOrder(ROWS, strategy, batch_size=4, seed=3)
    shared = TrainingOrder(Filled(ROWS, 4), strategy, batch_size=4, seed=3)
    assert sorted(alone) == list(range(10))
    assert list(shared) == [*alone, 10, 11] and len(shared) == 12
    first = list(alone)
    alone.set_epoch(1)
    if strategy != "group_by_length":  # so few rows that two epochs may be alike
        assert (list(alone) == first) == (strategy == "sequential")
    alone.set_epoch(0)
    assert list(alone) == first


def test_rows_of_like_length_stand_together():
    order = list(TrainingOrder(ROWS, "group_by_length", batch_size=2, seed=0))
    apart = ROWS.lengths[order[::2]] - ROWS.lengths[order[1::2]]
    assert set(abs(apart)) == {1}


def test_filling_rows_are_marked():
    filled = Filled(ROWS, 4)
    assert len(filled) == 12
    rows = filled.__getitems__([9, 10, 11])
    assert [row.get(PADDING, False) for row in rows] == [False, True, True]
    assert rows[1][ROW] == 9
    assert len(Filled(ROWS, 5)) == 10
