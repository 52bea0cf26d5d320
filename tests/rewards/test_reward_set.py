"""Rewards together: what functions are handed, what does not apply, failures, time, and rewards that wait."""

import asyncio
import functools
import json
import logging
import math
import threading
import time

import pytest
import torch

from shared.errors import UserError
from shared.rewards import background, waiting
from shared.rewards.base import FunctionReward, RowErrors, Sample
from shared.rewards.combine import RewardSet, unique_names


def samples(*outputs, **columns):
    return [
        Sample(f"p{at}", output, {"__row__": 10 + at, **{name: values[at] for name, values in columns.items()}})
        for at, output in enumerate(outputs)
    ]


def lengths(completions, **_):
    return [len(completion) for completion in completions]


def nan_equal(found, expected):
    return torch.equal(found.nan_to_num(-99.0), torch.tensor(expected).nan_to_num(-99.0))


def test_a_function_gets_what_its_signature_takes():
    seen = {}

    def all_of_it(prompts, completions, **rest):
        seen["all"] = {"prompts": prompts, "completions": completions, **rest}
        return [0.0, 1.0]

    def ids_alone(completion_ids):
        seen["ids"] = completion_ids
        return [len(ids) for ids in completion_ids]

    def some(kind, trainer_state, unused=3):
        seen["some"] = (kind, trainer_state, unused)
        return torch.tensor([0.5, 0.25])

    rows = samples("a", "b", completion_ids=[[1], [1, 2]], kind=["x", "y"])
    table = RewardSet([all_of_it, ids_alone, some])(rows, trainer_state="state")
    assert table.values.tolist() == [[0.0, 1.0, 0.5], [1.0, 2.0, 0.25]] and table.values.dtype == torch.float32
    assert table.names == ["all_of_it", "ids_alone", "some"] and len(table.seconds) == 3
    given = seen["all"]
    assert given.pop("log_extra") and given.pop("log_metric")
    assert given == {
        "prompts": ["p0", "p1"],
        "completions": ["a", "b"],
        "completion_ids": [[1], [1, 2]],
        "kind": ["x", "y"],
        "trainer_state": "state",
    }
    assert seen["ids"] == [[1], [1, 2]] and seen["some"] == (["x", "y"], "state", 3)


def test_a_column_that_a_function_needs_must_be_there():
    def needs(completions, solution):
        return [1.0] * len(completions)

    rewards = RewardSet(needs, on_error="skip")
    with pytest.raises(
        UserError, match="Reward needs takes 'solution', and the rows have no such column; there are: k"
    ):
        rewards(samples("a", kind=["x"]))
    with pytest.raises(UserError, match="there are: kind. Rename .* Every call has completion_ids, log_extra too"):
        rewards.check(["kind", "completion_ids", "log_extra"])
    rewards.check(["solution"])
    rows = [Sample("p", "a", {"solution": 1}), Sample("p", "b", {})]  # rows of a mixture
    assert rewards(rows).values.tolist() == [[1.0], [1.0]]


def test_what_a_reward_says_of_no_row_does_not_apply(caplog):
    def some(completions):
        return [None, math.nan, True]

    def none(completions):
        return [None] * len(completions)

    rewards = RewardSet([some, none], weights=[1, 0.5])
    for _ in range(2):
        table = rewards(samples("a", "b", "c"))
        assert nan_equal(table.values, [[math.nan, math.nan], [math.nan, math.nan], [1.0, math.nan]])
    assert not table.errors and rewards.weights.tolist() == [1.0, 0.5]
    assert caplog.text.count("Reward none gave None or NaN for all 3 rows") == 1 and "Reward some" not in caplog.text
    assert rewards([]).values.shape == (0, 2)


def breaks(completions, **_):
    return [1 / (completion != "bad") for completion in completions]


def endless(completions, **_):
    return [math.inf if completion == "bad" else 1.0 for completion in completions]


def worded(completions, **_):
    return ["much" if completion == "bad" else 1.0 for completion in completions]


def huge(completions, **_):
    return [1e39 if completion == "bad" else 1.0 for completion in completions]


def larger_still(completions, **_):
    return [10**400 if completion == "bad" else 1.0 for completion in completions]


async def breaks_async(completions, **_):
    return breaks(completions)


def breaks_later(completions, **_):
    return breaks_async(completions)


class Knows:
    def __call__(self, samples, context):
        raise RowErrors([1.0, None, 1.0], {1: ValueError("the server refused")})


FAILURES = [
    (breaks, "ZeroDivisionError: division by zero"),
    (endless, "it gave inf, which is not finite"),
    (worded, "it gave 'much', which is no number"),
    (huge, "it gave 1e\\+39, which is not finite"),
    (larger_still, "it gave a number that is too large"),
    (breaks_async, "ZeroDivisionError: division by zero"),
    (breaks_later, "ZeroDivisionError: division by zero"),
    (functools.partial(breaks), "ZeroDivisionError: division by zero"),
    (Knows(), "ValueError: the server refused"),
]


@pytest.mark.parametrize("function, reason", FAILURES)
def test_a_failure_names_function_and_row(function, reason, caplog):
    rows = samples("good", "bad", "fine")
    rewards = RewardSet(function)
    name = rewards.names[0]
    with pytest.raises(UserError, match=rf"Reward {name} failed on row 11 \('bad'\): {reason}.*\. .*on_reward_error"):
        rewards(rows)
    for on_error, value in (("zero", 0.0), ("skip", math.nan)):
        caplog.clear()
        rewards = RewardSet(function, on_error=on_error)
        for _ in range(2):
            table = rewards(rows)
            assert nan_equal(table.values, [[1.0], [value], [1.0]]) and table.errors == {name: 1}
        assert caplog.text.count("row 11 ('bad')") == 1


def short(completions):
    return [1.0] * (len(completions) - 1)


def bare(completions):
    return 1.0


def together(completions):
    if len(completions) > 1:
        raise RuntimeError("out of memory")
    return [1.0]


def logs_too_few(completions, log_extra):
    log_extra("column", completions[1:])
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function, reason",
    [
        (short, "it returned 2 values for 3 rows"),
        (bare, "it returned float '1.0'; expected a list"),
        (together, "RuntimeError: out of memory"),
        (logs_too_few, "log_extra\\('column'\\) got 2 values for 3 rows"),
    ],
)
def test_a_failure_of_the_whole_call_concerns_all_rows(function, reason):
    rows = samples("a", "b", "c")
    with pytest.raises(UserError, match=rf"failed on 3 rows together, the first row 10 \('a'\): {reason}"):
        RewardSet(function)(rows)
    table = RewardSet([function, lengths], on_error="zero")(rows)
    assert table.values.tolist() == [[0.0, 1.0]] * 3 and table.errors == {function.__name__: 3}
    assert RewardSet(function, on_error="skip")(rows).values.isnan().all()


def test_a_failure_is_told_with_its_line_and_the_rows_it_is_of():
    line = breaks.__code__.co_firstlineno + 1
    where = rf"failed on held-out row 11 \('bad'\): ZeroDivisionError: .* \(test_reward_set.py, line {line}\)\. "
    with pytest.raises(UserError, match=where):
        RewardSet(breaks)(samples("good", "bad"), mode="eval")
    with pytest.raises(UserError, match=r"failed on row 11 "):
        RewardSet(breaks)(samples("good", "bad"), mode="train")

    def parses(completions):
        return [float(len(json.loads(completion))) for completion in completions]

    line = parses.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"JSONDecodeError: .* \(test_reward_set.py, line {line}\)\. "):
        RewardSet(parses)(samples("[]", "no"))


def test_rows_without_a_number_are_named_by_their_place():
    with pytest.raises(UserError, match=r"failed on sample 1 of the call \('bad'\)"):
        RewardSet(breaks)([Sample("p", "good"), Sample("p", "bad")])
    long = [{"role": "assistant", "content": "x" * 100}]
    with pytest.raises(UserError, match=rf"\('{'x' * 60}…'\)"):
        RewardSet(short)([Sample("p", long)])


def test_rows_that_pass_are_scored_together_when_others_failed():
    def rank(completions):
        if "bad" in completions:
            raise ValueError("bad")
        return [sorted(completions).index(completion) for completion in completions]

    table = RewardSet(rank, on_error="zero")(samples("b", "bad", "a", "c"))
    assert table.values[:, 0].tolist() == [1.0, 0.0, 0.0, 2.0] and table.errors == {"rank": 1}


def test_rewards_that_wait_run_at_the_same_time():
    """Each of the three waits for the other two: one after another they would never end."""
    meeting = threading.Barrier(3, timeout=20)

    async def first(completions):
        await asyncio.to_thread(meeting.wait)
        return lengths(completions)

    async def second(completions):
        await asyncio.to_thread(meeting.wait)
        return [0.0] * len(completions)

    def plain(completions):
        meeting.wait()
        return [1.0] * len(completions)

    table = RewardSet([first, plain, second])(samples("abc"))
    assert table.values.tolist() == [[3.0, 1.0, 0.0]]
    assert all(seconds >= 0 for seconds in table.seconds)


def test_async_rewards_work_where_a_loop_runs_and_in_one_loop():
    loops = set()

    async def one(completions):
        loops.add(asyncio.get_running_loop())
        return lengths(completions)

    rewards = RewardSet([one, one])

    async def notebook():
        return rewards(samples("ab")).values.tolist()

    assert asyncio.run(notebook()) == rewards(samples("ab")).values.tolist() == [[2.0, 2.0]]
    assert len(loops) == 1


def test_a_reward_that_waits_too_long_is_left():
    async def slow(completions):
        await asyncio.sleep(30)

    class Remote:
        remote = True

        def __call__(self, completions):
            time.sleep(0.4)
            return lengths(completions)

    started = time.monotonic()
    with pytest.raises(UserError, match=r"Reward slow failed on 2 rows together.*took more than 0.05 s"):
        RewardSet(slow, timeout=0.05)(samples("a", "b"))
    table = RewardSet([slow, Remote(), lengths], timeout=0.05, on_error="skip")(samples("a", "b"))
    assert table.values.isnan().tolist() == [[True, True, False]] * 2 and table.errors == {"slow": 2, "Remote": 2}
    assert RewardSet(Remote(), timeout=20)(samples("abc")).values.tolist() == [[3.0]]
    assert time.monotonic() - started < 15


def test_a_reward_that_blocks_the_loop_does_not_hang_the_run(monkeypatch):
    monkeypatch.setattr(waiting, "GRACE", 0.05)
    release = threading.Event()

    async def blocks(completions):
        release.wait(20)
        return lengths(completions)

    async def fine(completions):
        return lengths(completions)

    try:
        with pytest.raises(UserError, match="blocks the event loop: an async function must await"):
            RewardSet(blocks, timeout=0.05)(samples("a"))
        assert RewardSet(fine, timeout=20)(samples("ab")).values.tolist() == [[2.0]]
    finally:
        release.set()


def test_a_plain_failure_stops_those_that_wait():
    stopped = threading.Event()

    async def waits(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            stopped.set()
            raise

    def fails(completions):
        time.sleep(0.05)
        raise ValueError("no")

    with pytest.raises(UserError, match="Reward fails failed"):
        RewardSet([waits, fails])(samples("a"))
    assert stopped.wait(10)


def test_functions_log_columns_and_figures():
    def logs(completions, log_extra, log_metric):
        log_extra("upper", [completion.upper() for completion in completions])
        log_metric("share", 1)
        log_metric("share", 2)
        return lengths(completions)

    async def logs_too(completions, log_extra, **_):
        log_extra("own", tuple(completions))
        return lengths(completions)

    table = RewardSet([logs, logs_too])(samples("a", "b"))
    assert table.extras == {"upper": ["A", "B"], "own": ["a", "b"]} and table.metrics == {"share": 1.5}


def test_a_reward_of_ones_own_takes_samples():
    def mine(samples, context):
        context["log_metric"]("seen", len(samples))
        return torch.tensor([float(sample.output == "a") for sample in samples])

    table = RewardSet([mine, FunctionReward(lengths, name="size")])(samples("a", "bc"))
    assert table.values.tolist() == [[1.0, 1.0], [0.0, 2.0]] and table.names == ["mine", "size"]
    assert table.metrics == {"seen": 2.0}


def test_names_are_each_used_once():
    assert RewardSet([lambda **_: [], lambda **_: [], lengths]).names == ["lambda", "lambda_2", "lengths"]
    assert unique_names(["a", "a_2", "a", "a"]) == ["a", "a_2", "a_3", "a_4"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: RewardSet([]), "There is no reward"),
        (lambda: RewardSet([lengths], weights=[1, 2]), "2 reward_weights for 1 rewards"),
        (lambda: RewardSet([lengths], weights=[math.nan]), "must be a finite number"),
        (lambda: RewardSet([lengths], weights=["1"]), "must be a finite number"),
        (lambda: RewardSet([lengths], on_error="ignore"), "allowed: raise, zero, skip"),
        (lambda: RewardSet([lengths], timeout=0), "timeout of rewards is 0 seconds"),
        (lambda: RewardSet([lengths], processing_classes=[None, None]), "2 reward_processing_classes for 1 rewards"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_weights_are_looked_at_before_a_model_loads():
    with pytest.raises(UserError, match="reward_weights"):
        RewardSet(["/no/such/model"], weights=[1, 2])


def test_an_array_or_tensor_is_taken(caplog):
    caplog.set_level(logging.WARNING)
    import numpy as np

    def array(completions):
        return np.array([1, 2])

    def scalars(completions):
        return [torch.tensor(1.5, requires_grad=True), np.float32(2)]

    def column(completions):
        return torch.ones(2, 1)

    table = RewardSet([array, scalars])(samples("a", "b"))
    assert table.values.tolist() == [[1.0, 1.5], [2.0, 2.0]] and not table.values.requires_grad
    with pytest.raises(UserError, match=r"a Tensor of shape \(2, 1\); expected one number for each row, \(2,\)"):
        RewardSet(column)(samples("a", "b"))


def test_the_loop_is_the_own_process_s(monkeypatch):
    async def own():
        return 1

    assert background.wait_for(own()) == 1
    before = background._loop
    monkeypatch.setattr(background, "_owner", -1)  # as a fork finds it
    assert background.wait_for(own()) == 1 and background._loop is not before


def test_a_columns_or_an_arguments_own_group_size_and_mode_come_first():
    seen = []

    def reward(completions, mode, group_size=None):
        seen.append((mode, group_size))
        return [0.0] * len(completions)

    RewardSet([reward, functools.partial(reward, mode="mine")])(samples("a", "b"), mode="train", group_size=2)
    RewardSet(reward)(samples("a", mode=["column"]), mode="train", group_size=1)
    assert seen == [("train", 2), ("mine", 2), (["column"], 1)]


def test_the_same_rewards_skipping_what_fails(caplog):
    def fails(completions, **_):
        raise ValueError("out of order")

    rewards = RewardSet([lengths, fails])
    skipping = rewards.skipping("to these")
    for _ in range(2):
        assert nan_equal(skipping(samples("a", "bcd")).values, [[1.0, math.nan], [3.0, math.nan]])
    assert caplog.text.count("out of order") == 1 and "It does not apply to these;" in caplog.text
    with pytest.raises(UserError, match="out of order"):
        rewards(samples("a"))
