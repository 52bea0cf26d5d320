"""Benchmark runs as array jobs of Slurm: a template is filled in for each command, and submitted.

The cluster makes the runs; here they are only written down, with their job, so that none is submitted twice.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmark_runs import RESUME, Run

from shared.errors import UserError

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
NEEDED = ("array", "seeds", "command", "output_dir")
USE = "srun {{command}} {{seed_option}} $seed {{output_option}} {{output_dir}}/seed-$seed"


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its `{{placeholders}}` replaced.

    Raises:
        UserError: it has one that is unknown, or lacks one without which no run can be found again.
    """
    used = set(PLACEHOLDER.findall(template))
    if unknown := sorted(used - set(values)):
        raise UserError(f"--slurm-template-path: {{{{{unknown[0]}}}}} is unknown. Known: {', '.join(values)}.")
    if missing := [name for name in NEEDED if name not in used]:
        raise UserError(f"--slurm-template-path: {{{{{missing[0]}}}}} is missing. A run is started by: {USE}")
    return PLACEHOLDER.sub(lambda found: str(values[found[1]]), template)


def write_jobs(runs: Sequence[Run], options: Any) -> list[tuple[Path, list[Run]]]:
    """An sbatch file for each command: one for those that start, one for those that go on from a checkpoint.

    Args:
        runs: those that are not done yet, ordered by command.
        options: of the command line.

    Returns:
        Each file with its runs, in the order of the tasks of its array.
    """
    path = Path(options.slurm_template_path)
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--slurm-template-path {path}: {error}.") from None
    jobs = []

    def kind(run: Run) -> tuple[bool, str]:
        return run.resumable, run.command.label

    for (resume, _), same in groupby(sorted(runs, key=kind), key=kind):
        several = list(same)
        text = fill(template, _values(several, options, resume=resume))
        name = "jobs-resume.slurm" if resume else "jobs.slurm"
        several[0].parent.mkdir(parents=True, exist_ok=True)
        file = several[0].parent.resolve() / name
        file.write_text(text, encoding="utf-8")
        jobs.append((file, several))
    return jobs


def _values(runs: Sequence[Run], options: Any, *, resume: bool) -> dict[str, Any]:
    one = runs[0]
    at_once = f"%{options.workers}" if options.workers else ""
    gpus = max(1, options.slurm_gpus_per_task * options.slurm_ntasks)
    return {
        "array": f"0-{len(runs) - 1}{at_once}",
        "seeds": f"({' '.join(str(run.seed) for run in runs)})",
        "len_seeds": len(runs),
        "command": shlex.join([*one.command.words, *(RESUME if resume else ())]),
        "gpus_per_task": options.slurm_gpus_per_task,
        "cpus_per_gpu": math.ceil(options.slurm_total_cpus / gpus),
        "ntasks": options.slurm_ntasks,
        "nodes": "" if options.slurm_nodes is None else f"#SBATCH --nodes={options.slurm_nodes}",
        "label": one.command.label,
        "seed_option": one.seed_option,
        "output_option": one.output_option,
        "output_dir": shlex.quote(str(one.parent.resolve())),
    }


def submit(file: Path, runs: Sequence[Run]) -> str:
    """Hand an sbatch file over, and write down which run is in which job.

    Returns:
        The job's number.

    Raises:
        UserError: sbatch is not there, or refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"There is no sbatch here. {file} is written: submit it on the cluster, or add --dry-run.")
    for run in runs:
        if not run.resumable:
            shutil.rmtree(run.folder, ignore_errors=True)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch {file}: {done.stderr.strip() or f'status {done.returncode}'}")
    job = done.stdout.strip().split(";")[0]
    for task, run in enumerate(runs):
        run.write_record(job=job, task=task)
    return job


def queued(runs: Sequence[Run]) -> list[Run]:
    """Those that are in the queue of Slurm still, waiting or running.

    Raises:
        UserError: the queue cannot be read: then nobody knows.
    """
    places = {run: (str(record["job"]), str(record["task"])) for run in runs if "job" in (record := run.record())}
    there: set[tuple[str, str]] = set()
    for job in sorted({job for job, _ in places.values()}):
        there |= {(job, task) for task in _tasks(job)}
    return [run for run in runs if places.get(run) in there]


def _tasks(job: str) -> list[str]:
    if shutil.which("squeue") is None:
        raise UserError(f"Runs are in Slurm's job {job}, and there is no squeue here. Use a machine of the cluster.")
    words = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%K"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and "invalid job id" not in done.stderr.lower():  # said of a job that ended long ago
        raise UserError(f"squeue: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout.split() if not done.returncode else []
