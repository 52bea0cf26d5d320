"""One side of a benchmark, in a process of its own: makes a block of steps when told to, and tells how long they took.

Imported by the workers in whatever interpreter has what they need; imports nothing of this project. The other end is
bench_sides.py: a line on standard input lets a side go on, a line of JSON on standard output tells of the block.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Turns:
    """Waits for its turn, counts the steps of a block and tells their time.

    Args:
        said: what is read by the other end.
        steps: of a block.
        device: of the model.

    Attributes:
        counted: what else is told of a block, by name; empty again for the next one.
        facts: what is told with every block.
        resident: bytes that peak memory is measured above; what is held when the first block begins unless `loaded`
            was called before.
    """

    def __init__(self, said: Any, steps: int, device: torch.device):
        self.said, self.steps, self.device = said, steps, device
        self.resident = 0
        self.facts: dict[str, float] = {}
        self.history: Callable[[], dict[str, float]] = dict

    def loaded(self) -> None:
        """What is held now is no part of the memory that training takes."""
        cuda = self.device.type == "cuda"
        self.resident = torch.cuda.memory_allocated() if cuda else _memory("VmRSS")

    def begin(self) -> None:
        """Tell that all is ready, and of the model as it is; make the first block when it is time."""
        if not self.resident:
            self.loaded()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the loading's
        self._tell(self.history())

    def _tell(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.said, flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.made, self.counted = 0, Counter()
        self.started = self.clock()

    def step(self) -> None:
        """Called at the end of each step."""
        self.made += 1
        if self.made == self.steps:
            seconds, cpu = (now - then for now, then in zip(self.clock(), self.started, strict=True))
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else _memory("VmHWM")
            told = {"seconds": seconds, "cpu_seconds": cpu, "mib": (peak - self.resident) / 2**20}
            self._tell({**told, **self.counted, **self.facts, **self.history()})

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, with its wall and processor seconds counted as `name` and `name`_cpu."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                for counted, now, then in zip((name, f"{name}_cpu"), self.clock(), started, strict=True):
                    self.counted[counted] += now - then

        return wrapped

    def clock(self) -> tuple[float, float]:
        """Wall and processor seconds, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def watch(self, trainer: Any, *names: str) -> None:
        """Have a trainer call `step`, and tell the figures of these names that it logged for its first step."""
        from transformers import TrainerCallback

        class Step(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                self.step()

        def history() -> dict[str, float]:
            logged = next((entry for entry in trainer.state.log_history if "loss" in entry), {})
            return {name: float(logged[name]) for name in ("loss", "grad_norm", *names) if name in logged}

        trainer.add_callback(Step())
        self.history = history


def answering() -> Any:
    """The stream to the other end. What libraries print goes elsewhere from now on: it is no answer."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return said


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
