"""The runs of a benchmark: a command with a seed and a folder of its own, made several at once.

What is known of a run lies beside its folder: `seed-1.json` has its command, `seed-1.log` what it printed. Whether it
is done is read from the run's own report. Says nothing of what is measured, nor of clusters.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shared.errors import UserError
from shared.runtime.checkpoint import checkpoints, is_complete, write_atomically
from shared.runtime.command import USER_ERROR
from shared.runtime.report_text import format_duration

LABELLED = re.compile(r"([^\s=/]+)=(.+)", re.DOTALL)
RESUME = ("--resume_from_checkpoint", "true")
POLL = 0.05  # seconds
TRIES = 2
LOG_LINES = 12
LAST_WORDS = 8192  # bytes of a log that are looked at
GRACE = 60.0  # seconds that what a run has started may outlive it when all are stopped


@dataclass(frozen=True)
class Command:
    """One of those that are compared.

    Attributes:
        label: its name in tables, pictures and folders.
        words: the command without seed and folder.
    """

    label: str
    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Command:
        """Of `python x.py --a b` or `label=python x.py --a b`; without a label the script's name is taken.

        Raises:
            UserError: it is empty, not quoted as a shell would have it, or no program can be found for it.
        """
        found = LABELLED.fullmatch(text.strip())
        label, line = found.groups() if found else ("", text)
        try:
            words = tuple(shlex.split(line))
        except ValueError as error:
            raise UserError(f"--command {text}: {error}.") from None
        if not words:
            raise UserError(f"--command {text!r}: there is nothing to run.")
        if shutil.which(words[0]) is None:
            raise UserError(
                f"--command {text}: {words[0]} is no program. A word with = in front is the label; variables are set "
                "outside, or by `env NAME=value python ...`."
            )
        scripts = [Path(word).stem for word in words if word.endswith(".py")]
        label = label or (scripts[0] if scripts else Path(words[0]).name)
        if label.startswith((".", "-")):
            raise UserError(f"--command {text}: the label {label} names a folder; start it with a letter or a digit.")
        return cls(label, words)


def parse_commands(texts: Sequence[str]) -> list[Command]:
    """All of them; two of one label are a UserError."""
    commands = [Command.parse(text) for text in texts]
    labels = [command.label for command in commands]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"Two commands are called {twice[0]}: give them labels, as in --command 'label=python ...'.")
    return commands


@dataclass(frozen=True)
class Run:
    """A command with one seed.

    Attributes:
        command: what is run.
        seed: its seed.
        parent: the folder of all runs of that command.
        seed_option, output_option: how the command is told its seed and its folder.
    """

    command: Command
    seed: int
    parent: Path
    seed_option: str
    output_option: str

    def __str__(self) -> str:
        return f"{self.command.label}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.parent / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        return self.parent / f"seed-{self.seed}.log"

    @property
    def _record(self) -> Path:
        return self.parent / f"seed-{self.seed}.json"

    @property
    def identity(self) -> list[str]:
        """What makes it this run and no other: the folder may be moved."""
        return [*self.command.words, self.seed_option, str(self.seed)]

    def words(self, resume: bool = False) -> list[str]:
        return [*self.identity, self.output_option, str(self.folder), *(RESUME if resume else ())]

    def record(self) -> dict[str, Any]:
        """What was written down of it; empty where nothing was."""
        return _read_json(self._record)

    def write_record(self, **facts: Any) -> None:
        write_atomically(self._record, json.dumps({**facts, "command": self.identity}, indent=1) + "\n")

    def report(self) -> dict[str, Any]:
        """The run's report.json; empty where there is none."""
        return _read_json(self.folder / "report" / "report.json")

    @property
    def finished(self) -> bool:
        return self.record().get("command") == self.identity and self.report().get("status") == "finished"

    @property
    def resumable(self) -> bool:
        return any(is_complete(path) for path in checkpoints(self.folder))

    def check_folder(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            UserError: it holds the run of another command, or what no benchmark has made.
        """
        record = self.record()
        if record and record.get("command") != self.identity:
            raise UserError(
                f"{self.folder} holds the run of another command ({shlex.join(record.get('command', ()))}). Use "
                "another label or --output-dir, or start anew with --overwrite."
            )
        if not record and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds files that are of no benchmark. Use another --output-dir.")

    def clear(self) -> None:
        """Remove what an earlier run has left, if it was one of a benchmark's."""
        if self._record.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.log.unlink(missing_ok=True)
            self._record.unlink()

    def last_words(self, since: int = 0) -> str:
        """The end of its log, of what was printed after the first `since` bytes."""
        if not self.log.is_file():
            return f"    (no log: {self.log})"
        with self.log.open("rb") as file:
            file.seek(max(since, self.log.stat().st_size - LAST_WORDS))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
        return "\n".join(f"    {line}" for line in lines) or "    (it printed nothing)"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


class _Attempt:
    """A run that is under way; a second try takes over its log."""

    def __init__(self, run: Run, environment: dict[str, str], device: str | None):
        run.parent.mkdir(parents=True, exist_ok=True)
        self.run, self.device, self.number = run, device, 0
        self.environment = environment if device is None else {**environment, "CUDA_VISIBLE_DEVICES": device}
        self.log = _locked(run.log)
        self.resumed, self.before = False, run.record().get("seconds", 0.0)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        run = self.run
        # A run that cannot be resumed, by the user's error (its last step is done already), is started anew.
        hopeless = self.resumed and self.process is not None and self.process.returncode == USER_ERROR
        self.resumed = run.resumable and not hopeless
        if not self.resumed:
            shutil.rmtree(run.folder, ignore_errors=True)
            self.before = 0.0
        self.number += 1
        run.write_record(seconds=self.before)
        words = run.words(resume=self.resumed)
        self.log.write(f"$ {shlex.join(words)}\n".encode())
        self.log.flush()
        self.printed, self.began = os.fstat(self.log.fileno()).st_size, time.monotonic()
        # A session of its own: Ctrl-C reaches this process alone, which then tells the runs once.
        how = "goes on from its checkpoint" if self.resumed else "starts"
        print(f"{run} {how}; what it prints is in {run.log}", flush=True)
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self.environment,
            start_new_session=True,
        )  # fmt: skip

    def outcome(self) -> str | None:
        """What went wrong; None where nothing did."""
        self.before += time.monotonic() - self.began
        self.run.write_record(seconds=round(self.before, 1))
        if self.process.returncode:
            return f"ended with status {self.process.returncode}"
        status = self.run.report().get("status")
        if status is None:
            return f"wrote no report/report.json in {self.run.folder} (which {self.run.output_option} names)"
        return None if status == "finished" else f"ended with a report that says {status}"


def _locked(path: Path) -> IO[bytes]:
    """The log, opened and locked: what runs holds the lock too, even if this process is killed."""
    log = path.open("ab")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            raise UserError(
                f"{path} is written to by a run that is still under way. Wait for it, or end it."
            ) from None
        except OSError:  # a file system without locks
            pass
    return log


def run_all(runs: Sequence[Run], workers: int, devices: Sequence[str] = ()) -> list[Run]:
    """Make the runs, `workers` at once; one that fails is tried once more, and the others go on.

    Args:
        runs: those that are not done yet.
        workers: processes at once.
        devices: what `CUDA_VISIBLE_DEVICES` is for each of them; empty: left as it is.

    Returns:
        Those that failed twice.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, once all runs have ended; a second one kills them.
    """
    threads = max(1, (os.cpu_count() or 1) // min(workers, max(1, len(runs))))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    waiting, free, done = deque(runs), list(devices), 0
    running: list[_Attempt] = []
    failed: list[Run] = []
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                attempt = _Attempt(waiting.popleft(), environment, free.pop(0) if free else None)
                running.append(attempt)
                attempt.start()
            time.sleep(POLL)
            for attempt in [each for each in running if each.process.poll() is not None]:
                if not _ended(attempt, f"[{done + 1}/{len(runs)}] {attempt.run}", failed):
                    attempt.start()
                    continue
                done += 1
                running.remove(attempt)
                attempt.log.close()
                free += [] if attempt.device is None else [attempt.device]
    except BaseException:
        _stop(running)
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)
    return failed


def _ended(attempt: _Attempt, name: str, failed: list[Run]) -> bool:
    """Say how an attempt went; False where it is to be tried again."""
    wrong = attempt.outcome()
    if wrong is None:
        print(f"{name}: finished after {format_duration(attempt.before)}", flush=True)
        return True
    again = attempt.number < TRIES
    print(f"{name}: {wrong}; {'tried once more' if again else 'given up'}. The end of {attempt.run.log}:", flush=True)
    print(attempt.run.last_words(attempt.printed), flush=True)
    if not again:
        failed.append(attempt.run)
    return not again


def _stop(running: Sequence[_Attempt]) -> None:
    """Let the runs save what they have, and wait for them; a second signal kills."""
    import psutil

    running = [attempt for attempt in running if attempt.process is not None]
    if not running:
        return
    print(f"Stopping {len(running)} run(s), which save what they have; once more kills them.", flush=True)
    trees = []
    for attempt in running:
        with contextlib.suppress(psutil.Error):
            trees += psutil.Process(attempt.process.pid).children(recursive=True)
    try:
        for attempt in running:
            _signal_group(attempt, signal.SIGTERM)
        for attempt in running:
            attempt.process.wait()
        psutil.wait_procs(trees, timeout=GRACE)  # a launcher may be gone before its script
    except KeyboardInterrupt:
        for attempt in running:
            _signal_group(attempt, signal.SIGKILL)
            attempt.process.wait()
    for attempt in running:
        attempt.outcome()
        attempt.log.close()


def _signal_group(attempt: _Attempt, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(attempt.process.pid, number)
