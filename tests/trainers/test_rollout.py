"""What stands between sampling and updates: rounds that divide, prompts in order, micro-batches of like lengths."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from shared.data.rows import Rows
from shared.errors import DataError, UserError
from shared.trainers.rollout import Buffer, Prompts, Rollout, cut, in_memory, joined_extras, padded, round_shape

LENGTHS = torch.tensor([3, 9, 1, 1, 5, 5, 2, 8, 7, 7, 4, 4, 6, 1, 2, 2])


def options(**changed):
    given = {"per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 2}
    return SimpleNamespace(**{"dynamic_sampling": False, **given, **changed})


@pytest.mark.parametrize(
    ("changed", "world", "shape"),
    [
        ({}, 1, (8, 4, 4)),
        ({"per_device_train_batch_size": 2}, 1, (4, 4, 2)),  # a group over two micro-batches
        ({"per_device_train_batch_size": 6, "num_generations": 4}, 1, (12, 4, 2)),
        ({"per_device_train_batch_size": 1, "num_generations": 8}, 4, (2, 2, 1)),  # and over four processes
        ({"per_device_train_batch_size": 16, "steps_per_generation": 1}, 2, (16, 4, 4)),
    ],
)
def test_the_shape_of_a_round(changed, world, shape):
    assert round_shape(options(**changed), world) == shape


@pytest.mark.parametrize(
    ("changed", "world", "message"),
    [
        ({"num_generations": 1}, 1, "num_generations 1: must be at least 2"),
        ({"num_generations": 3}, 1, "4 × steps_per_generation 2 × 1 .* = 8 samples"),
        ({"num_generations": 16}, 1, "multiple of 16"),
        ({"num_generations": 16, "dynamic_sampling": True}, 2, "whole groups on each process"),
    ],
)
def test_rounds_that_do_not_divide(changed, world, message):
    with pytest.raises(UserError, match=message):
        round_shape(options(**changed), world)


@pytest.mark.parametrize(("unit", "per_batch", "window"), [*itertools.product((1, 2, 4), (4, 8), (1, 2))])
def test_a_cut_holds_all_rows_once_and_keeps_units_and_steps(unit, per_batch, window):
    parts = cut(LENGTHS, unit, per_batch, window)
    assert [len(part) for part in parts] == [per_batch] * (16 // per_batch)
    rows = [row for part in parts for row in part]
    assert sorted(rows) == list(range(16))
    for at in range(0, 16, unit):
        first = rows[at]
        assert first % unit == 0 and rows[at : at + unit] == list(range(first, first + unit))
    step = window * per_batch
    for at in range(0, 16, step):
        assert sorted(rows[at : at + step]) == list(range(at, at + step)), "a step has the rows that it has uncut"
    if window == 1:
        assert rows == list(range(16))


def test_rows_of_like_length_share_a_micro_batch():
    assert cut(LENGTHS[:8], 2, 4, 2) == [[2, 3, 4, 5], [6, 7, 0, 1]]
    assert cut(LENGTHS[:12], 2, 4, 2)[2] == [10, 11, 8, 9], "what is left over is a shorter step"


def test_a_buffer_is_gone_through_as_often_as_asked():
    rollout = Rollout([None] * 4, 2, None, torch.ones(4), torch.zeros(4))
    buffer = Buffer(rollout, [[0, 1], [2, 3]], 2, born=5)
    seen = []
    while not buffer.spent:
        seen.append(buffer.next())
    assert seen == [[0, 1], [2, 3], [0, 1], [2, 3]] and buffer.cursor == 4 and rollout.rows == 4


def test_padded_rows():
    assert padded([torch.tensor([1.0, 2.0]), torch.tensor([])], 3).tolist() == [[1, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_prompts_come_once_an_epoch_and_go_on_from_a_cursor(shuffle):
    rows = Rows([{"prompt": str(at)} for at in range(5)])
    prompts = Prompts(rows, shuffle=shuffle, seed=3)
    drawn = [*prompts.draw(3), *prompts.draw(4), *prompts.draw(8)]
    epochs = [drawn[at : at + 5] for at in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert (epochs[0] == list(range(5))) == (not shuffle) and (epochs[0] == epochs[1] == epochs[2]) == (not shuffle)
    again = Prompts(rows, shuffle=shuffle, seed=3)
    again.cursor = 4
    assert again.draw(11) == drawn[4:]


def test_a_row_is_read_once_for_all_of_its_places():
    read = []

    class Counted(Rows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    prompts = Prompts(Counted([{"prompt": str(at)} for at in range(3)]), shuffle=False, seed=0)
    found = prompts.at([2, 0, 2])
    assert [row["prompt"] for row in found] == ["2", "0", "2"] and found[0] is found[2]
    assert read == [2, 0]


def test_a_stream_is_read_as_far_as_the_run_can_draw():
    rows = [{"prompt": "a"}]
    assert in_memory(rows, None) is rows and in_memory(None, None) is None

    def endless():
        at = 0
        while True:
            yield {"prompt": str(at)}
            at += 1

    assert len(in_memory(endless(), 7)) == 7
    with pytest.raises(UserError, match="max_steps is missing"):
        in_memory(endless(), None)


def test_rows_that_cannot_be_used_give_way_to_the_row_behind_them():
    rows, asked = [{"prompt": str(at), "__row__": 10 + at} for at in range(4)], []

    def check(row):
        asked.append(row["__row__"])
        if row["__row__"] in (11, 13):
            raise DataError(f"row {row['__row__']}: too long")
        return "was cut" if row["__row__"] == 12 else None

    prompts = Prompts(rows, shuffle=False, seed=0, check=check, skip=True)
    assert [row["prompt"] for row in prompts.at([0, 1, 3, 1])] == ["0", "2", "0", "2"]
    assert prompts.notes == {11: "left out: too long", 12: "was cut", 13: "left out: too long"}
    assert asked.count(11) == asked.count(13) == 1
    with pytest.raises(DataError, match="row 11: too long"):
        Prompts(rows, shuffle=False, seed=0, check=check).at([0, 1])
    with pytest.raises(DataError, match="No row can be used; the last: left out: too long"):
        Prompts(rows[1:2], shuffle=False, seed=0, check=check, skip=True).at([0])


def test_notes_of_several_rollouts_go_on_beside_their_rows():
    parts = [Rollout([None] * 2, 1, None, torch.ones(2), torch.zeros(2), extras=each) for each in (
        {"a": [1, 2]}, {"b": [3, 4]})]  # fmt: skip
    assert joined_extras(parts, [[1], [0, 1]]) == {"a": [2, None, None], "b": [None, 3, 4]}
