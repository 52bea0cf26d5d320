"""One call of a reward that waits: started beside others, and given up when its time is over.

Deliberately not here: what becomes of rows without a value (combine.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from shared.errors import UserError
from shared.rewards import background
from shared.rewards.base import FunctionReward, Reward, Sample, as_values

GRACE = (
    5.0  # seconds after its timeout that an async reward is waited for: longer only where something blocks the loop
)


class TimedOut(UserError):
    """A reward did not answer within its time."""


class Call:
    """A call that has been started: of an async function in the event loop, of others in a thread of their own.

    Args:
        reward: what is called.
        samples: B samples.
        context: as a Reward takes it.
        name: of the reward.
        timeout: seconds; None: no limit.
    """

    def __init__(
        self,
        reward: Reward,
        samples: Sequence[Sample],
        context: Mapping[str, Any],
        *,
        name: str,
        timeout: float | None,
    ):
        self._again = partial(Call, reward, samples, context, name=name, timeout=timeout)
        self._name, self._timeout = name, timeout
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._in_loop = isinstance(reward, FunctionReward) and reward.is_async
        self._left = False
        if self._in_loop:
            self._loop = background.running()
            self._future = background.submit(_run_async(reward, samples, context, timeout), name)
        else:
            self._future = background.in_thread(partial(run, reward, samples, context), self._stop)

    @property
    def hangs(self) -> bool:
        """Whether it was given up, and still runs."""
        return self._left and (self._in_loop or not self._future.done())

    def result(self) -> tuple[Any, float]:
        """What the reward returned or raised, and the seconds it took."""
        wait = None
        if self._timeout is not None:
            until = self._started + self._timeout + (GRACE if self._in_loop else 0.0)
            wait = max(0.0, until - time.monotonic())
        try:
            return self._future.result(wait)
        except TimeoutError:
            problem = f"it took more than {self._timeout:g} s"
        if not self._in_loop:
            self._left = True
            self.cancel()
            return TimedOut(problem), time.monotonic() - self._started
        blocker = background.blocker(self._loop)
        self.cancel()
        background.abandon(self._loop)
        if blocker not in (None, self._name):  # it had no turn
            return self._again().result()
        self._left = True
        problem += ", and blocks the event loop: an async function must await"
        return TimedOut(problem), time.monotonic() - self._started

    def cancel(self) -> None:
        """Wait for it no more; what can be stopped is stopped."""
        self._stop.set()
        self._future.cancel()


def run(reward: Reward, samples: Sequence[Sample], context: Mapping[str, Any]) -> tuple[Any, float]:
    """What a reward returned or raised, and the seconds it took."""
    started = time.monotonic()
    try:
        found = as_values(reward(samples, context), len(samples))
    except Exception as error:  # a user's function may raise anything
        found = error
    return found, time.monotonic() - started


async def _run_async(
    reward: FunctionReward, samples: Sequence[Sample], context: Mapping[str, Any], timeout: float | None
) -> tuple[Any, float]:
    started = time.monotonic()
    try:
        async with asyncio.timeout(timeout) as limit:
            found = await reward.call_async(samples, context)
    except Exception as error:  # a user's function may raise anything
        found = TimedOut(f"it took more than {timeout:g} s") if limit.expired() else error
    return found, time.monotonic() - started
