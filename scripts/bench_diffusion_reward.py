"""How long DDPO and AlignProp take to the same reward, here and, where it is installed, by the last trl that had them.

All train `builtin/sd-small` on the training prompts of `builtin/picture-prompts`, with the same reward (brightness, or
how well what is drawn has the colour that the prompt names), adapter, guidance and pictures of an optimizer step.
After every `--every` steps the reward of the same held-out pictures is measured, by plain diffusers and outside the
clock; a side goes on until it reaches `--target`. Each runs in a process of its own; time is the processor's. trl's
trainers need guidance, under which colours are right from the start: that is why the reward is brightness.

    python scripts/bench_diffusion_reward.py --trl_python path/to/an/environment/bin/python   # of trl==0.23.1
    python scripts/bench_diffusion_reward.py --side ddpo-fast alignprop-late --target 0.6 --output reward.json

Sides: trl-ddpo; ddpo, with the same options; ddpo-fast, noise and gradient in two steps (CPS), the rest by a solver of
second order, many pairs of a picture and a step in a pass. trl-alignprop and alignprop have the gradient of the last
half of the steps, alignprop-late that of the last two: a scheduler of Stable Diffusion leaves hardly any noise to the
very last one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_sides import Side, write_figures

from shared.builtin import load_dataset, pipeline_path
from shared.errors import UserError
from shared.runtime.command import run_command

WORKER = Path(__file__).with_name("bench_diffusion_worker.py")
SIDES = ("trl-ddpo", "ddpo", "ddpo-fast", "trl-alignprop", "alignprop", "alignprop-late")
HEADER = "| by | seed | steps | pictures judged | CPU s | reward before | after |\n|---|---:|---:|---:|---:|---:|---:|"
ROW = "| {by} | {seed} | {steps} | {pictures} | {cpu_seconds:.0f} | {before:.3f} | {after:.3f} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="a Python interpreter that has trl 0.23; without it trl is left out")
    parser.add_argument("--model", help="folder of another pipeline of the type of Stable Diffusion")
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--target", type=float, default=0.7, help="of the held-out reward")
    parser.add_argument("--most_seconds", type=float, default=600, help="processor's, after which a side is stopped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--reward", choices=["colour", "brightness"], default="brightness")
    parser.add_argument("--rows", type=int, default=64, help="pictures of an optimizer step of ddpo")
    parser.add_argument("--alignprop_rows", type=int, default=16, help="pictures of an optimizer step of alignprop")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt; for ddpo")
    parser.add_argument("--micro", type=int, default=16, help="pictures of a micro-batch")
    parser.add_argument("--steps", type=int, default=10, help="of a picture")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--folded", type=int, default=64, help="pairs in a pass; for ddpo-fast")
    parser.add_argument("--ddpo_lr", type=float, default=4e-3)
    parser.add_argument("--alignprop_lr", type=float, default=4e-3)
    parser.add_argument("--clip", type=float, default=1e-3, help="of ddpo's ratio")
    parser.add_argument("--every", type=int, default=2, help="steps between two measurements")
    parser.add_argument("--judged", type=int, default=64, help="held-out pictures")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def own_options(by: str, options: Any) -> dict[str, Any]:
    """What a side is given beside the setting."""
    half = {"truncated_backprop_timestep": options.steps // 2}
    fast = {"sampler": "cps", "solver": "dpm", "window_size": 2, "pairs_at_once": options.folded}
    return {
        "trl-ddpo": {"case": "ddpo", "train_clip_range": options.clip},
        "ddpo": {"case": "ddpo", "epsilon": options.clip},
        "ddpo-fast": {"case": "ddpo", "epsilon": options.clip, **fast},
        "trl-alignprop": {"case": "alignprop", **half},
        "alignprop": {"case": "alignprop", **half},
        "alignprop-late": {"case": "alignprop", "truncated_backprop_timestep": options.steps - 2},
    }[by]


def prepare(by: str, seed: int, folder: Path, options: Any) -> int:
    """Write into a folder what the worker reads: the pipeline and the prompts. Gives the pictures of a step."""
    shutil.copytree(options.model or pipeline_path("builtin/sd-small"), folder / "model")
    own = own_options(by, options)
    rows = options.rows if own["case"] == "ddpo" else options.alignprop_rows
    names = ("group", "steps", "guidance", "threads", "reward")
    setting = {
        **{name: getattr(options, name) for name in names},
        "rows": rows,
        "micro": min(options.micro, rows),
        "lr": options.ddpo_lr if own["case"] == "ddpo" else options.alignprop_lr,
        "seed": seed,
        "block_steps": options.every,
        "prompts": load_dataset("builtin/picture-prompts", "train")["prompt"][:512],
        "held_out": load_dataset("builtin/picture-prompts", "test")["prompt"][: options.judged],
        "sides": {by: own},
    }
    (folder / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
    return rows


def figure_of(by: str, seed: int, options: Any) -> dict[str, Any]:
    """How a side's reward grew, up to the target."""
    python = options.trl_python if by.startswith("trl") else sys.executable
    with tempfile.TemporaryDirectory() as name:
        rows = prepare(by, seed, Path(name), options)
        side = Side(by, python, WORKER, Path(name), options.threads)
        curve: list[tuple[float, float]] = []
        spent, began = 0.0, side.began["held_out"]
        try:
            while spent < options.most_seconds and (not curve or curve[-1][1] < options.target):
                told = side.block()
                spent += told["cpu_seconds"]
                curve.append((spent, told["held_out"]))
        finally:
            side.end()
    steps = len(curve) * options.every
    return {
        "by": by, "seed": seed, "steps": steps, "pictures": steps * rows, "cpu_seconds": spent, "before": began,
        "after": curve[-1][1], "reached": curve[-1][1] >= options.target, "curve": curve, "target": options.target,
    }  # fmt: skip


def main() -> None:
    options = arguments()
    if options.rows % options.group or options.rows % options.micro:
        raise UserError(f"--rows {options.rows}: must be a multiple of --group and of --micro.")
    print(HEADER, flush=True)
    figures = []
    for seed in options.seeds:
        for by in options.side:
            if by.startswith("trl") and not options.trl_python:
                continue
            figures.append(figure_of(by, seed, options))
            print(ROW.format(**figures[-1]) + ("" if figures[-1]["reached"] else " not reached"), flush=True)
    write_figures(figures, options.output)


if __name__ == "__main__":
    run_command(main)
