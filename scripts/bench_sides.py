"""The sides of a benchmark, each in a process of its own: they take turns, and what they told becomes figures.

The other end, in those processes, is bench_turns.py. Says nothing of what is trained.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.errors import UserError

Told = dict[str, float]  # of a block


class Side:
    """One of those that train, in its own process, standing still between blocks."""

    def __init__(self, by: str, python: str, script: Path, folder: Path, threads: int):
        self.by, self.errors = by, folder / f"{by}.log"
        settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(script), by, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **settings},
            )
        self.began = self.answer()

    def answer(self) -> Told:
        """What the side says next.

        Raises:
            UserError: it ended; with its last words.
        """
        line = self.process.stdout.readline()
        if not line:
            words = self.errors.read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise UserError(f"{self.by} failed: {' / '.join(words)}")
        return json.loads(line)

    def block(self) -> Told:
        """Make a block of steps."""
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def blocks_in_turns(
    script: Path,
    pythons: dict[str, str],
    folder: Path,
    *,
    warm: int,
    blocks: int,
    threads: int,
    check: Callable[[dict[str, list[Told]]], None],
) -> dict[str, list[Told]]:
    """What every side tells of its blocks; they make one block each after the other.

    Args:
        script: the worker's, called with the side's name and `folder`.
        pythons: the interpreter of each side.
        warm: blocks of each before those that are measured.
        blocks: measured blocks of each.
        threads: of each.
        check: called with what each side told of those first blocks.

    Raises:
        UserError: a side failed.
    """
    sides: list[Side] = []
    try:
        for by, python in pythons.items():
            sides.append(Side(by, python, script, folder, threads))

        def in_turns(count: int) -> dict[str, list[Told]]:
            rounds = [{side.by: side.block() for side in sides} for _ in range(count)]
            return {by: [told[by] for told in rounds] for by in pythons}

        check(in_turns(warm))
        return in_turns(blocks)
    finally:
        for side in sides:
            side.end()


def told_of(
    setting: dict[str, Any],
    options: Any,
    script: Path,
    pythons: dict[str, str],
    prepare: Callable[[dict[str, Any], Path, Any], None],
    check: Callable[[dict[str, list[Told]]], None],
) -> dict[str, list[Told]]:
    """What every side tells of its blocks in one setting, for which `prepare` fills a folder.

    Args:
        options: `blocks`, `block_steps` and `threads`; two steps come before those that are measured.
        script, pythons, check: see blocks_in_turns.

    Raises:
        UserError: a side failed.
    """
    with tempfile.TemporaryDirectory() as name:
        prepare(setting, Path(name), options)
        return blocks_in_turns(
            script,
            pythons,
            Path(name),
            warm=math.ceil(2 / options.block_steps),
            blocks=options.blocks,
            threads=options.threads,
            check=check,
        )


def check_same(first: dict[str, list[Told]], tolerances: dict[str, float]) -> dict[str, float]:
    """The comparison is void where the sides do not compute the same numbers.

    Args:
        first: the first blocks of each side; what they logged of their first step is in the last of them.
        tolerances: relative, by the number's name.

    Returns:
        The largest relative difference of each number.
    """
    differences = dict.fromkeys(tolerances, 0.0)
    for by, blocks in first.items():
        for name, tolerance in tolerances.items():
            ours, other = first["ours"][-1][name], blocks[-1][name]
            differences[name] = max(differences[name], abs(ours - other) / max(abs(other), 1e-12))
            assert abs(ours - other) < 1e-5 + tolerance * abs(other), f"{name} differs: ours {ours}, {by} {other}"
    return differences


def median(blocks: list[Told], name: str) -> float:
    return statistics.median(block[name] for block in blocks)


def figure_of(by: str, told: dict[str, list[Told]], options: Any) -> dict[str, Any]:
    """What every benchmark tells of a side: seconds of a step, MiB, and what they are to those of the trainer here."""
    blocks, ours = told[by], told["ours"]

    def ratios(name: str) -> list[float]:
        return [their[name] / own[name] for their, own in zip(blocks, ours, strict=True)]

    mib, own = (max(block["mib"] for block in each) for each in (blocks, ours))
    return {
        "by": by,
        "seconds": median(blocks, "seconds") / options.block_steps,
        "cpu_seconds": median(blocks, "cpu_seconds") / options.block_steps,
        "time_ratio": statistics.median(ratios("seconds")), "time_ratios": ratios("seconds"),
        "cpu_ratio": statistics.median(ratios("cpu_seconds")), "cpu_ratios": ratios("cpu_seconds"),
        "mib": mib, "memory_ratio": mib / own,
        "blocks": options.blocks, "threads": options.threads, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def tell(
    settings: Iterable[dict[str, Any]],
    figures_of: Callable[[dict[str, Any], Any], list[dict[str, Any]]],
    options: Any,
    *,
    header: str,
    row: str,
    each: str = "",
) -> None:
    """What a benchmark's script does: measure setting after setting, show a line for each side, write the figures.

    Args:
        settings: what is measured.
        figures_of: gives a setting's records, one a side.
        options: those of the command line.
        header, row: of the table; `row` is a format of a record.
        each: what the last line says of every setting, behind the number of cores.

    Raises:
        UserError: there is nothing to measure.
    """
    if options.blocks < 1 or options.block_steps < 1:
        raise UserError("nothing to measure: give --blocks and --block_steps of 1 or more.")
    settings = list(settings)
    print(header, flush=True)
    figures: list[dict[str, Any]] = []
    for setting in settings:
        found = figures_of(setting, options)
        figures += found
        for figure in found:
            print(row.format(**figure), flush=True)
        write_figures(figures, options.output)
    print(
        f"Medians of {options.blocks} blocks; {options.threads} of {os.cpu_count()} cores{each}. Ratios: to the time "
        "and memory of the trainer here."
    )


def write_figures(figures: list[dict[str, Any]], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
