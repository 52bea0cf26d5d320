"""Rewards that wait and hang: none keeps others from running, holds the process, or is blamed for another."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.rewards import background, combine, waiting
from shared.rewards.base import Sample
from shared.rewards.combine import RewardSet

ROOT = Path(__file__).resolve().parents[2]


def samples(*outputs):
    return [Sample("p", output, {"__row__": at}) for at, output in enumerate(outputs)]


class Remote:
    """Waits in its thread; `hang` is released at a test's end."""

    remote = True

    def __init__(self):
        self.hang, self.hanging, self.calls = threading.Event(), True, 0
        self.lock = threading.Lock()

    def __call__(self, completions):
        with self.lock:
            self.calls += 1
        if self.hanging:
            self.hang.wait(30)
        return [float(len(completion)) for completion in completions]


@pytest.fixture
def remote():
    reward = Remote()
    yield reward
    reward.hang.set()


def test_calls_that_hang_do_not_keep_later_ones_from_running(remote):
    rewards = RewardSet(remote, timeout=0.02, on_error="skip")
    for _ in range(12):
        assert rewards(samples("ab")).values.isnan().all()
    remote.hanging = False
    rewards.timeout = 20
    assert rewards(samples("ab")).values.tolist() == [[2.0]] and remote.calls == 13


def test_a_reward_that_always_hangs_ends_the_run(remote, monkeypatch):
    monkeypatch.setattr(combine, "MOST_HUNG", 3)
    rewards = RewardSet(remote, timeout=0.02, on_error="skip")
    for _ in range(2):
        rewards(samples("a"))
    with pytest.raises(UserError, match="3 calls of reward Remote took more than 0.02 s and have not returned"):
        rewards(samples("a"))


HANGS = """
import threading, sys
from shared.rewards.base import Sample
from shared.rewards.combine import RewardSet
from shared.rewards.judges import EndpointJudge
class Hangs:
    remote = True
    def __call__(self, completions):
        threading.Event().wait(60)
RewardSet([Hangs(), EndpointJudge(sys.argv[1], "m", retries=9, backoff=60)], timeout=0.2, on_error="skip")(
    [Sample("p", "a")]
)
"""


def test_calls_that_hang_do_not_hold_the_process():
    started = time.monotonic()
    # nothing listens there: the judge would wait for its next attempt
    command = [sys.executable, "-c", HANGS, "http://127.0.0.1:9"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=40, capture_output=True)
    assert time.monotonic() - started < 35


def test_a_row_s_time_starts_when_it_runs(monkeypatch):
    monkeypatch.setattr(combine, "AT_ONCE", 2)

    class Slow:
        remote = True
        running = most = 0

        def __call__(self, completions):
            if "bad" in completions:
                raise ValueError("bad")
            type(self).running += 1
            type(self).most = max(self.most, self.running)
            time.sleep(0.3 if len(completions) == 1 else 0)
            type(self).running -= 1
            return [1.0] * len(completions)

    table = RewardSet(Slow(), timeout=1.0, on_error="skip")(samples("bad", *"abcdefghij"))
    assert table.errors == {"Slow": 1} and table.values.isnan().flatten().tolist() == [True] + [False] * 10
    assert Slow.most == 2


def test_only_the_first_bad_row_is_looked_for_where_it_ends_the_run():
    class Counts:
        remote = True
        calls = 0

        def __call__(self, completions):
            type(self).calls += 1
            if "bad" in completions:
                raise ValueError("bad")
            return [1.0] * len(completions)

    with pytest.raises(UserError, match="row 1 "):
        RewardSet(Counts())(samples("a", "bad", "c", "d", "e"))
    assert Counts.calls == 3


def test_the_reward_that_blocks_the_loop_is_named(monkeypatch):
    monkeypatch.setattr(waiting, "GRACE", 0.1)
    release = threading.Event()

    async def healthy(completions):
        return [1.0] * len(completions)

    async def inner():
        release.wait(20)

    async def blocks(completions):
        import asyncio

        await asyncio.gather(inner())

    def plain(completions):
        time.sleep(0.05)
        return [0.0] * len(completions)

    try:
        # what blocks is begun first, so that the others have no turn
        table = RewardSet([blocks, healthy, plain], timeout=0.1, on_error="skip")(samples("a"))
        assert table.errors == {"blocks": 1} and table.values[0, 1:].tolist() == [1.0, 0.0]
        with pytest.raises(UserError, match="Reward blocks failed .* blocks the event loop"):
            RewardSet([_late(healthy), blocks], timeout=0.1)(samples("a"))
    finally:
        release.set()


def _late(function):
    async def healthy(completions):
        import asyncio

        await asyncio.sleep(0.01)
        return await function(completions)

    return healthy


def test_work_in_threads_stops_at_an_error():
    done = []

    def work(place):
        if place == 1:
            raise ValueError("one")
        done.append(place)

    with pytest.raises(ValueError, match="one"):
        background.for_each(work, 5, 1)
    assert done == [0]
    background.for_each(done.append, 3, 2)
    assert sorted(done[1:]) == [0, 1, 2]


def test_what_a_late_call_gives_is_dropped(remote):
    rewards = RewardSet(remote, timeout=0.02, on_error="zero")
    table = rewards(samples("abc"))
    remote.hang.set()
    time.sleep(0.05)
    assert torch.equal(table.values, torch.zeros(1, 1))
