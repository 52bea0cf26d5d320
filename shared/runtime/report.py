"""The run report: what a run was, what it reached, and the figures behind it, as index.html and report.json.

Figures that a trainer logs come from its own history; nothing is measured here but the machine (`environment`,
`peak_memory`). One process writes (the caller sees to it), and importing this file loads neither torch nor pillow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.runtime.checkpoint import write_atomically
from shared.runtime.report_curves import Curves, curves_from_log
from shared.runtime.report_grid import PictureGrid
from shared.runtime.report_html import render
from shared.runtime.report_pictures import Picture, from_plain, to_plain
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

PICTURES = "pictures.json"  # the thumbnails that a resumed run shows again
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
        before_images, after_images: PIL images that the model made, before and after training.
    """

    images: list[Image]
    question: str
    answer: str
    before: str | None = None
    after: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    verbatim: bool = True
    before_images: list[Image | Picture] = field(default_factory=list)
    after_images: list[Image | Picture] = field(default_factory=list)

    def as_before(self) -> SampleRow:
        """The same row, with what was answered now as what was answered before training."""
        shown = [Picture.of(image) for image in self.after_images]
        return replace(self, before=self.after, after=None, before_images=shown, after_images=[])

    def since(self, earlier: SampleRow) -> SampleRow:
        """The same row, with what an earlier one has of before training."""
        return replace(self, before=earlier.before, before_images=earlier.before_images)


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
        grid: the same prompts' pictures at several steps; filled by `add_pictures`.
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
        self.grid = PictureGrid()
        self.status = "finished"

    def add_curves(self, log_history: Sequence[Mapping]) -> None:
        """Take the curves from `state.log_history`, in the place of those held until now.

        A resumed run restores its history, so the last call always shows the whole run.
        """
        self.curves = curves_from_log(log_history)

    def add_rollouts(self, table: RolloutTable) -> None:
        """Take the sample table of one step, its pictures made small; of many tables the older ones are thinned."""
        self.rollouts = add_table(self.rollouts, table.with_thumbnails())

    def add_pictures(
        self,
        step: int,
        prompts: Sequence[str],
        images: Sequence[Image],
        rewards: Sequence[float | None] | None = None,
        label: str = "",
    ) -> None:
        """Take the pictures of the same prompts, from the same noise, at one more step; see PictureGrid.add."""
        self.grid.add(step, prompts, images, rewards, label)

    def recall(self, directory: str | Path, *, up_to: int | None = None) -> None:
        """Take from an earlier report what a resumed run cannot measure again.

        That is what was measured and answered before training, and what was sampled so far. The pictures that the
        model made come back, those of the prompts do not.

        Args:
            directory: the earlier report's folder; nothing is taken where there is no report.
            up_to: the step from which the run goes on; what was sampled later is left out. None: all is taken.
        """
        path, kept = Path(directory) / "report.json", Path(directory) / PICTURES
        if not path.is_file():
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        shown = from_plain(json.loads(kept.read_text(encoding="utf-8"))) if kept.is_file() else {}
        self.before = earlier["before"]
        self.rollouts = from_json(earlier.get("rollouts", ()), up_to=up_to, pictures=shown.get("rollouts"))
        if "grid" in shown and "grid" in earlier:
            self.grid = PictureGrid.from_json(earlier["grid"], shown["grid"], up_to=up_to)
        images = shown.get("before", [])
        self.samples = [
            SampleRow([], sample["question"], sample["answer"], sample["before"], before_images=pictures or [])
            for sample, pictures in zip_longest(earlier["samples"], images[: len(earlier["samples"])])
        ]

    def write(self) -> Path:
        """Write report.json and index.html, each by one atomic replacement; of image runs pictures.png too.

        Returns:
            The path of index.html.

        Raises:
            OSError: the folder cannot be made or written; what was there before is left as it was.
        """
        figures = self._figures()
        page = render(figures, self.samples, self.units, self.rollouts, self.grid)
        self.directory.mkdir(parents=True, exist_ok=True)
        if pictures := self._pictures():
            write_atomically(self.directory / PICTURES, json.dumps(to_plain(pictures)))
        if self.grid.columns:
            write_atomically(self.directory / "pictures.png", self.grid.png())
        text = json.dumps(_without_nan(figures), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.directory / "report.json", text + "\n")
        write_atomically(self.directory / "index.html", page)
        return self.directory / "index.html"

    def _pictures(self) -> dict[str, Any]:
        """What the model drew, as far as it is shown; empty where it drew nothing."""
        tables = {str(table.step): [row.output_images for row in table.rows] for table in self.rollouts}
        before = [row.before_images for row in self.samples]
        drawn = {
            "rollouts": {step: rows for step, rows in tables.items() if any(rows)},
            "grid": {str(column.step): column.pictures for column in self.grid.columns},
            "before": before if any(before) else [],
        }
        return {name: kept for name, kept in drawn.items() if kept}

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
            **({"grid": plain(self.grid.to_json())} if self.grid.columns else {}),
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
    facts |= _versions()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
    return facts


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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
