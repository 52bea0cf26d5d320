"""One event loop in a thread of its own, for rewards that wait: it is reused, and needs no loop of the caller.

A notebook's loop may run in the caller: it is not touched. Deliberately not here: what is run in it (combine.py).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0  # the process that started the loop: a fork has no thread that runs it


def submit(awaitable: Awaitable[Any]) -> Future:
    """Start what is awaited in the loop; its result comes by the future."""
    return asyncio.run_coroutine_threadsafe(_result_of(awaitable), _running())


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Run what is awaited in the loop, and wait for its result."""
    future = submit(awaitable)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def abandon() -> None:
    """Leave a loop alone that something blocks; the next call starts another."""
    global _loop
    with _lock:
        _loop = None


def _running() -> asyncio.AbstractEventLoop:
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="rewards", daemon=True).start()
        return _loop


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
