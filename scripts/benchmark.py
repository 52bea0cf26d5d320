"""Run commands over seeds, several at once or as jobs of Slurm, and compare them in a table and a picture.

Shown is the mean over seeds, with its spread. Any command will do that takes a seed and a folder, and writes
`report/report.json` there, as every trainer here does.

    python scripts/benchmark.py --command "python scripts/dpo.py --beta 0.1" --num-seeds 3 --start-seed 1 --workers 2
    python scripts/benchmark.py --command "b0.1=python scripts/dpo.py --beta 0.1" \\
        "b0.5=python scripts/dpo.py --beta 0.5" --workers 4 --gpus 0 1 2 3 --metric eval_loss --plot beta.png
    python scripts/benchmark.py --command "grpo=python scripts/grpo.py" --command "dpo=python scripts/dpo.py" \\
        --metric reward --metric-of dpo=rewards/margins --plot both.png
    python scripts/benchmark.py --command "python scripts/dpo.py" --num-seeds 8 \\
        --slurm-template-path scripts/benchmark_template.slurm --slurm-gpus-per-task 1 --slurm-total-cpus 12

`--dry-run` (or `--workers 0`) shows what would be run; of Slurm's files it writes them and submits none. A run that
fails is tried once more. The same command a second time makes what is not finished yet, from the last checkpoint where
there is one: after Ctrl-C too, and after Slurm's jobs are done. `--collect-only` runs nothing.

Written: each run's folder, log and record in `--output-dir`/LABEL/, and `--output-dir`/benchmark.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_results import check_plot, metrics_to_show, parse_metric_of, plot, summary, table
from benchmark_runs import Command, Run, parse_commands, run_all
from benchmark_slurm import queued, submit, write_jobs

from shared.errors import UserError
from shared.runtime.checkpoint import write_atomically
from shared.runtime.command import run_command

FAILED = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, text: str | None = None, **kind: Any) -> None:
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        parser.add_argument(*spellings, help=text, **kind)

    option("command", "to run, in quotes; with a label: label=...", nargs="+", action="extend", required=True)
    option("num-seeds", type=int, default=3)
    option("start-seed", type=int, default=1)
    option("workers", "runs at once; 0 shows what would be run (default: 1; with Slurm no limit)", type=int)
    option("gpus", "CUDA_VISIBLE_DEVICES of each worker, as in: --gpus 0 1", nargs="+", default=[])
    option("seed-option", "how the commands are told their seed", default="--seed")
    option("output-option", "how the commands are told their folder", default="--output_dir")
    option("output-dir", "of all runs", default="runs/benchmark")
    option("overwrite", "start anew the runs that are there", action="store_true")
    option("dry-run", "show what would be run", action="store_true")
    option("collect-only", "run nothing: compare the runs that are finished", action="store_true")
    option("metric", "the curve that is drawn (default: a usual one that all have)")
    option("metric-of", "label=metric, where a command's differs", nargs="+", action="extend", default=[])
    option("plot", "file of the picture; needs matplotlib")
    option("slurm-template-path", "an sbatch file with {{placeholders}}: the runs become array jobs")
    option("slurm-gpus-per-task", type=int, default=1)
    option("slurm-total-cpus", "of one run", type=int, default=50)
    option("slurm-ntasks", "of one run", type=int, default=1)
    option("slurm-nodes", "of one run", type=int)
    options = parser.parse_args()
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    least = {"num_seeds": 1, "start_seed": 0, "workers": 0, "slurm_gpus_per_task": 0}
    least |= dict.fromkeys(("slurm_total_cpus", "slurm_ntasks", "slurm_nodes"), 1)
    for name, low in least.items():
        if (given := getattr(options, name)) is not None and given < low:
            raise UserError(f"--{name.replace('_', '-')} {given}: has to be at least {low}.")
    if options.gpus and len(options.gpus) < (options.workers or 1):
        raise UserError(f"--gpus names {len(options.gpus)} for {options.workers} workers: each needs one of its own.")
    check_plot(options.plot)


def plan(commands: Sequence[Command], options: argparse.Namespace) -> list[Run]:
    """All runs, one seed of every command after the other: what is there after half of the time can be compared."""
    folder = Path(options.output_dir)
    seeds = range(options.start_seed, options.start_seed + options.num_seeds)
    return [
        Run(command, seed, folder / command.label, options.seed_option, options.output_option)
        for seed in seeds
        for command in commands
    ]


def show(runs: Sequence[Run], left: Sequence[Run]) -> None:
    for run in runs:
        resume = run in left and run.resumable
        state = "goes on" if resume else "is run" if run in left else "is finished"
        print(f"{run} {state}: {shlex.join(run.words(resume=resume))}")


def make(runs: Sequence[Run], options: argparse.Namespace) -> bool:
    """Make the runs that are not finished.

    Returns:
        Whether there is something to compare: not after a dry run, and not while Slurm is at work.
    """
    dry = options.dry_run or options.workers == 0
    if not dry:
        try:
            Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-dir {options.output_dir}: {error.strerror}. Name another folder.") from None
    busy = queued(runs)
    if busy and options.overwrite:
        raise UserError(f"{busy[0]} is in the queue of Slurm: cancel its job first, or leave --overwrite out.")
    for run in runs:
        if options.overwrite and not dry:
            run.clear()
        if not options.overwrite:
            run.check_folder()
    left = [run for run in runs if run not in busy and (not run.finished or (dry and options.overwrite))]
    for run in busy:
        print(f"{run} is in the queue of Slurm still.")
    if dry:
        show([run for run in runs if run not in busy], left)
    if options.slurm_template_path:
        for run in (run for run in left if "job" in run.record()):
            print(f"{run} did not finish in job {run.record()['job']}. The end of {run.log}:\n{run.last_words()}")
        for file, several in write_jobs(left, options):
            if dry:
                print(f"\n{file}:\n{file.read_text(encoding='utf-8')}")
            else:
                print(f"Job {submit(file, several)} has {len(several)} run(s) of {several[0].command.label}: {file}")
        if left and not dry:
            print("When the jobs are done, the same command again compares what they reached.")
        return not (dry or left or busy)
    if dry:
        return False
    if len(left) < len(runs) - len(busy):
        print(f"{len(runs) - len(busy) - len(left)} of {len(runs)} runs are finished already.", flush=True)
    try:
        run_all(left, options.workers or 1, options.gpus)
    except KeyboardInterrupt:
        done = sum(run.finished for run in runs)
        print(f"Stopped: {done} of {len(runs)} runs are finished. The same command makes the rest.", flush=True)
        raise
    return True


def compare(commands: Sequence[Command], runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Write benchmark.json, print the table and draw the picture; runs that are missing are named."""
    metric_of = parse_metric_of(options.metric_of, [command.label for command in commands])
    summaries = [
        summary(command.label, command.words, [run for run in runs if run.command == command]) for command in commands
    ]
    written = Path(options.output_dir) / "benchmark.json"
    write_atomically(written, json.dumps({"commands": summaries}, indent=1) + "\n")
    asked = options.metric or metric_of or options.plot
    shown, wrong = {}, None
    try:
        shown = metrics_to_show(summaries, options.metric, metric_of)
    except UserError as error:
        wrong = error if asked else None
    print(table(summaries, shown))
    print(f"Written: {written}", flush=True)
    missing = [run for run in runs if not run.finished]
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are not finished and left out:")
        for run in missing:
            print(f"  {run}: {run.log}", flush=True)
            if options.collect_only:
                print(run.last_words(), flush=True)
    if wrong is not None:
        raise wrong
    if options.plot and shown:
        plot(summaries, shown, Path(options.plot))
        print(f"Picture: {options.plot}", flush=True)
    if missing:
        raise SystemExit(FAILED)


def main() -> None:
    options = arguments()
    commands = parse_commands(options.command)
    parse_metric_of(options.metric_of, [command.label for command in commands])
    runs = plan(commands, options)
    if options.collect_only:
        for run in runs:
            run.check_folder()
    if options.collect_only or make(runs, options):
        compare(commands, runs, options)


if __name__ == "__main__":
    run_command(main)
