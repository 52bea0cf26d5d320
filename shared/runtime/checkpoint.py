"""What resume needs beyond the trainer's own state: which checkpoints are complete, whose folder this is, and signals.

A checkpoint is complete when its mark is there; the mark is written last, by one rename, after every process has
written its part. A run that is killed in the middle of writing leaves a folder without a mark, which is never resumed
from. Weights, optimizer, scheduler and random states themselves are written by transformers.Trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from shared.errors import UserError

MARK = "complete.json"
RUN_FILES = ("run.yaml", "report")
RUN_PATTERN = re.compile(r"checkpoint-(\d+)$")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, sees the old text or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed temporary name: what a killed run leaves behind is overwritten by the next one, not piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A half of a surrogate pair, cut off in generation, is no reason to lose a report.
        content = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, oldest first."""
    folder = Path(output_dir)
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if p.is_dir() and (m := RUN_PATTERN.search(p.name))]
    return [path for _, path in sorted(found)]


def is_complete(checkpoint: Path) -> bool:
    """Whether every process had written its part of this checkpoint."""
    return (checkpoint / MARK).is_file()


def mark_complete(checkpoint: Path, *, step: int, processes: int) -> None:
    """To be called by one process, once all have written."""
    write_atomically(checkpoint / MARK, json.dumps({"step": step, "processes": processes}))


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, complete or not; the mark goes first, so that nothing cut short looks complete."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def processes_of(checkpoint: Path) -> int | None:
    """How many processes wrote a checkpoint; None where its mark does not say."""
    try:
        return json.loads((checkpoint / MARK).read_text(encoding="utf-8")).get("processes")
    except (OSError, json.JSONDecodeError):
        return None


def rotate(output_dir: str | Path, *, keep: int | None, spared: Sequence[str | Path] = ()) -> None:
    """Delete all but the `keep` newest complete checkpoints and those spared; incomplete older ones go too."""
    found = checkpoints(output_dir)
    complete = [path for path in found if is_complete(path)]
    if not complete:
        return
    kept = {path.resolve() for path in (complete if not keep or keep < 0 else complete[-keep:])}
    kept.update(Path(path).resolve() for path in spared)
    for path in found:
        if path.resolve() not in kept and path != found[-1]:
            discard(path)


def resume_path(asked: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        asked: a checkpoint folder; True, "true" or "last" for the newest complete one in `output_dir`; or nothing.
        output_dir: the run's folder.

    Raises:
        UserError: there is no complete checkpoint, or the folder given is not one.
    """
    if asked in (None, False, "", "false", "False"):
        return None
    if asked in (True, "true", "True", "last"):
        complete = [path for path in checkpoints(output_dir) if is_complete(path)]
        if not complete:
            broken = [path.name for path in checkpoints(output_dir)]
            found = f"only incomplete ones ({', '.join(broken)})" if broken else "none"
            raise UserError(
                f"--resume_from_checkpoint: no complete checkpoint in {output_dir}: {found}. Name another "
                "--output_dir or a checkpoint folder, or leave the option out to start anew."
            )
        return complete[-1]
    path = Path(asked)
    if not is_complete(path):
        others = [str(p) for p in checkpoints(path if checkpoints(path) else path.parent) if is_complete(p)]
        hint = f" Complete ones: {', '.join(others)}." if others else ""
        raise UserError(f"--resume_from_checkpoint {path}: not a complete checkpoint of this suite.{hint}")
    return path


def default_output_dir(stem: str, resume: str | bool | None) -> str:
    """A folder for a run that was given none: the newest one of this name to resume, else the next free number."""
    if isinstance(resume, str) and resume not in ("true", "True", "last", "false", "False", ""):
        return str(Path(resume).parent)
    number, existing = 1, []
    while (folder := Path(stem if number == 1 else f"{stem}-{number}")).exists():
        existing.append(folder)
        number += 1
    if resume in (True, "true", "True", "last") and existing:
        return str(existing[-1])
    return str(folder)


def check_output_dir(output_dir: str | Path, *, resuming: bool, overwrite: bool) -> None:
    """Raise UserError when the folder holds another run that would be mixed up with this one."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file. Name a folder.")
    if resuming or overwrite or not folder.is_dir():
        return
    held = [name for name in RUN_FILES if (folder / name).exists()] + [p.name for p in checkpoints(folder)]
    if held:
        raise UserError(
            f"--output_dir {folder} holds another run ({', '.join(held[:4])}). Add --resume_from_checkpoint true to "
            "go on with it, --overwrite_output_dir to start anew in it, or name another folder."
        )


def clear_run(output_dir: str | Path) -> None:
    """Remove an earlier run's checkpoints, report and options; nothing else in the folder is touched."""
    folder = Path(output_dir)
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Interruption:
    """While active, SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once.

    A second one within a second is the same one: a terminal sends it to the launcher too, which passes it on. Signals
    can be handled in a program's main thread alone: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received == signal.SIGINT and now - self._since > 1.0:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = number, now
