"""The run report: what a run was, what it reached, and the figures behind it, as index.html and report.json.

Figures that a trainer logs come from its own history; nothing is measured here but the machine (`environment`,
`peak_memory`). One process writes (the caller sees to it), and importing this file loads neither torch nor pillow.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.runtime.checkpoint import write_atomically
from shared.runtime.report_curves import Curves, curves_from_log
from shared.runtime.report_html import render
from shared.runtime.report_text import as_number, before_after_table
from shared.runtime.rollout_tables import RolloutRow, RolloutTable, add_table, from_json, rollout_text, to_json
from shared.secrets import is_secret

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "RolloutRow",
    "RolloutTable",
    "RunReport",
    "SampleRow",
    "before_after_table",
    "environment",
    "peak_memory",
    "plain",
    "rollout_text",
]

PACKAGES = (
    "trialign",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "diffusers",
    "deepspeed",
    "bitsandbytes",
)

MASK = "***"
LOGIN_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass
class SampleRow:
    """One row of the sample table.

    Attributes:
        images: PIL images of any size and mode, in the order the model sees them.
        question: the prompt as text.
        answer: the reference answer; empty if there is none, then nothing is marked right or wrong.
        before, after: the model's answer before and after training; None where it was not asked.
        columns: further columns, e.g. `kind` or the parts of a reward.
        verbatim: whether an answer that is not the reference word for word is marked as wrong.
    """

    images: list[Image]
    question: str
    answer: str
    before: str | None = None
    after: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    verbatim: bool = True


class RunReport:
    """Collects what a run has to tell and writes it; may be written as often as one likes.

    Attributes to fill (all optional):
        before, after: metric -> value; a name with the word `accuracy` is a share in [0, 1].
        throughput: e.g. `samples_per_second`, `tokens_per_second`, `train_seconds`.
        peak_memory: place -> bytes, as `peak_memory()` gives it.
        units: metric -> what its curve counts, e.g. `{"loss": "nats per token"}`.
        notes: lines for the reader: rows that were skipped, where the run was interrupted, how to go on.
        samples: rows of the sample table.
        rollouts: sample tables of an online run, ascending steps; filled by `add_rollouts`.
        status: `finished`, `interrupted` or `failed`.

    Args:
        directory: the report's own folder, e.g. `output_dir/report`; made when written.
        title: the page's heading.
        config: the effective configuration. Secrets (`*_token`, `*_key`, `password`) are masked and the home folder
            is shortened to `~`, since reports are passed on.
    """

    def __init__(self, directory: str | Path, *, title: str, config: Mapping[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        self.title = title
        self.config = dict(config or {})
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.curves: Curves = {}
        self.throughput: dict[str, float] = {}
        self.peak_memory: dict[str, float] = {}
        self.units: dict[str, str] = {}
        self.notes: list[str] = []
        self.samples: list[SampleRow] = []
        self.rollouts: list[RolloutTable] = []
        self.status = "finished"

    def add_curves(self, log_history: Sequence[Mapping]) -> None:
        """Take the curves from `state.log_history`, in the place of those held until now.

        A resumed run restores its history, so the last call always shows the whole run.
        """
        self.curves = curves_from_log(log_history)

    def add_rollouts(self, table: RolloutTable) -> None:
        """Take the sample table of one step, its pictures made small; of many tables the older ones are thinned."""
        self.rollouts = add_table(self.rollouts, table.with_thumbnails())

    @staticmethod
    def rollouts_from(figures: Mapping[str, Any], *, up_to: int | None = None) -> list[RolloutTable]:
        """The tables of an earlier report, without their pictures.

        Args:
            figures: what report.json holds.
            up_to: the step from which the run goes on; later tables are left out. None: all are taken.
        """
        return from_json(figures.get("rollouts", ()), up_to=up_to)

    def write(self) -> Path:
        """Write report.json and index.html, each by one atomic replacement.

        Returns:
            The path of index.html.

        Raises:
            OSError: the folder cannot be made or written; what was there before is left as it was.
        """
        figures = self._figures()
        page = render(figures, self.samples, self.units, self.rollouts)
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_nan(figures), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.directory / "report.json", text + "\n")
        write_atomically(self.directory / "index.html", page)
        return self.directory / "index.html"

    def _figures(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "status": self.status,
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "notes": list(self.notes),
            "before": plain(self.before),
            "after": plain(self.after),
            "throughput": plain(self.throughput),
            "peak_memory": plain(self.peak_memory),
            "curves": self.curves,
            "samples": [
                {
                    "images": len(row.images),
                    "question": row.question,
                    "answer": row.answer,
                    "before": row.before,
                    "after": row.after,
                    "columns": plain(row.columns),
                }
                for row in self.samples
            ],
            "rollouts": plain(to_json(self.rollouts)),
            "config": _shareable(plain(self.config)),
            "environment": environment(),
        }


def environment() -> dict[str, str | int]:
    """The software and hardware of this process; nothing that names the machine or its user.

    GPUs are listed if torch is imported already: importing it for a report would cost seconds.
    """
    libc = " ".join(platform.libc_ver()).strip()
    facts: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": ", ".join(part for part in (f"{platform.system()} {platform.machine()}", libc) if part),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
    return facts


def peak_memory() -> dict[str, float]:
    """Place -> the most bytes held so far: `process` (resident), and `cuda:N` for each GPU this process has used."""
    peaks: dict[str, float] = {"process": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            used = torch.cuda.max_memory_allocated(device)
            if used:
                peaks[f"cuda:{device}"] = float(used)
    return peaks


def _peak_resident() -> float:
    if sys.platform.startswith("linux"):
        # Not getrusage: its ru_maxrss outlives exec, so that a process would report the peak of its launcher.
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return float(found[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def plain(value: Any) -> Any:
    """`value` in JSON's types; anything else becomes its `str`. NaN stays for now: the page shows it."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    number = as_number(value)
    return str(value) if number is None else number


def _shareable(value: Any, name: str = "") -> Any:
    """Plain `value` without secrets, and without the path of the home folder."""
    if value is not None and is_secret(name):
        return MASK
    if isinstance(value, dict):
        return {key: _shareable(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    if isinstance(value, str):
        value = LOGIN_IN_ADDRESS.sub(MASK, value)
        home = str(Path.home())
        if value == home:
            return "~"
        return value.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else value
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
