"""Where rewards run that wait: one event loop in a thread of its own, and a thread for each call of those that block.

The loop is reused, and needs no loop of the caller: a notebook's is not touched. All threads are daemons, so that a
call that hangs neither keeps others from starting nor holds the process at its end. Deliberately not here: what is run
and for how long it is waited for (waiting.py).
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0  # the process that started the loop: a fork has no thread that runs it
_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("stop", default=None)
_name: contextvars.ContextVar[str | None] = contextvars.ContextVar("name", default=None)
_names: weakref.WeakKeyDictionary[asyncio.Task, str | None] = weakref.WeakKeyDictionary()


def running() -> asyncio.AbstractEventLoop:
    """The loop, started where there is none."""
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            _loop.set_task_factory(_task)
            threading.Thread(target=_loop.run_forever, name="rewards", daemon=True).start()
        return _loop


def submit(awaitable: Awaitable[Any], name: str | None = None) -> Future:
    """Start what is awaited in the loop; its result comes by the future.

    Args:
        name: of what runs, tasks that it starts included; see `blocker`.
    """
    context = contextvars.copy_context()
    context.run(_name.set, name)
    return context.run(asyncio.run_coroutine_threadsafe, _result_of(awaitable), running())


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Run what is awaited in the loop, and wait for its result."""
    future = submit(awaitable)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def blocker(loop: asyncio.AbstractEventLoop) -> str | None:
    """The name of what runs in a loop at this moment, and blocks it where it has done so for long; None: unknown."""
    task = asyncio.current_task(loop)
    return None if task is None else _names.get(task)


def abandon(loop: asyncio.AbstractEventLoop) -> None:
    """Leave a loop alone that something blocks; the next call starts another."""
    global _loop
    with _lock:
        if _loop is loop:
            _loop = None


def in_thread(function: Callable[[], Any], stop: threading.Event) -> Future:
    """Call a function in a thread of its own; its result comes by the future.

    Args:
        function: what is called; `stop_of_call()` gives it `stop`.
        stop: set where nobody waits for the result any more.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()  # what runs cannot be taken back

    def run() -> None:
        _stop.set(stop)
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def stop_of_call() -> threading.Event:
    """Set where nobody waits any more for the call that this runs in."""
    return _stop.get() or threading.Event()


def for_each(function: Callable[[int], None], count: int, at_once: int) -> None:
    """Call a function with 0, 1, ... count - 1, several at once; none begins after an error or a stop of the call."""
    stop, places, errors = stop_of_call(), deque(range(count)), []

    def work() -> None:
        while places and not stop.is_set():
            try:
                place = places.popleft()
            except IndexError:
                return
            try:
                function(place)
            except BaseException as error:
                errors.append(error)
                places.clear()

    threads = [threading.Thread(target=work, name="reward", daemon=True) for _ in range(min(at_once, count))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        places.clear()
        stop.set()
        raise
    if errors:
        raise errors[0]


def _task(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task:
    task = asyncio.Task(coroutine, loop=loop, **options)
    _names[task] = _name.get()
    return task


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
