"""Measure sampling and training of DDPO and AlignProp and, where it is installed, the last trl's that had them beside.

Same pipeline (of the type of Stable Diffusion, with random weights), prompts, first adapter, reward, guidance and
AdamW on all sides, float32; the first step is on the same noise, and that all have the same reward and gradient there
is checked. Each runs in a process of its own, and they take turns, a block of steps each. Memory is the process's peak
above the loaded model. Needs no network. A ratio above 1 in time and in memory speaks for the trainer here.

    python scripts/bench_diffusion.py --trl_python path/to/an/environment/bin/python   # of trl==0.23.1; minutes
    python scripts/bench_diffusion.py --case ddpo --rows 4 16 64 --steps 10 --size 32

Sides of ddpo: ours, with the same batches as trl; folded, `--folded` pairs of a picture and a step in a pass of the
denoiser, the same gradient; fast, that, and noise and gradient in two steps alone, the rest by a solver. Those of
alignprop: ours, steps computed again in the backward pass as trl does; kept, without; last, the gradient of the last
step alone. Both have it from the middle of the chain otherwise.

Without factors, settings are the middle one (10 steps, 16 pictures in micro-batches of 8, 32 pixels, a denoiser of 0.6
million parameters) and those that differ from it in one of these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

from bench_sides import check_same, figure_of, median, tell, told_of

from shared.errors import UserError
from shared.runtime.command import run_command

WORKER = Path(__file__).with_name("bench_diffusion_worker.py")
CASES = ("ddpo", "alignprop")
LR = 1e-5
SAME = ("ours", "trl", "folded", "kept")  # whose first steps have the same gradient
FACTORS = {"steps": [5, 10, 20], "rows": [4, 16, 64], "size": [32, 64], "width": [1, 4]}
MIDDLE = {"steps": 10, "rows": 16, "size": 32, "width": 1}
HEADER = (
    "| case | steps | pictures | pixels | width | by | pictures a second: sampling | training | both | CPU s a step "
    "| time ratio | CPU ratio | MiB | ratio |\n|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
ROW = (
    "| {case} | {steps} | {rows} | {size} | {width} | {by} | {sampling:.1f} | {training:.1f} | {both:.1f} "
    "| {cpu_seconds:.2f} | {time_ratio:.2f} | {cpu_ratio:.2f} | {mib:.0f} | {memory_ratio:.2f} |"
)
PROMPTS = [f"a {colour} {form}" for colour in ("red", "green", "blue", "yellow") for form in ("circle", "square")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="a Python interpreter that has trl 0.23; without it trl is left out")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--side", nargs="+", help="of those above; ours is always there")
    parser.add_argument("--steps", type=int, nargs="+", help="of a picture")
    parser.add_argument("--rows", type=int, nargs="+", help="pictures of an optimizer step")
    parser.add_argument("--size", type=int, nargs="+", help="pixels of a side; multiples of 8")
    parser.add_argument("--width", type=int, nargs="+", help="of the denoiser; parameters grow with its square")
    parser.add_argument("--micro", type=int, default=8, help="pictures of a micro-batch, at most")
    parser.add_argument("--group", type=int, default=4, help="pictures of a prompt; for ddpo")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--folded", type=int, default=80, help="pairs in a pass; for folded and fast")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each; medians are reported")
    parser.add_argument("--block_steps", type=int, default=1, help="optimizer steps of a block")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def settings_of(options: Any) -> list[dict[str, Any]]:
    """The settings that the options ask for.

    Raises:
        UserError: pictures that make no groups or micro-batches.
    """
    given = {name: values for name in FACTORS if (values := getattr(options, name))}
    if given:
        chosen = {**{name: [value] for name, value in MIDDLE.items()}, **given}
        settings = [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]
    else:
        others = [{**MIDDLE, name: value} for name, values in FACTORS.items() for value in values]
        settings = [MIDDLE, *(each for each in others if each != MIDDLE)]
    for setting in settings:
        setting["micro"] = min(options.micro, setting["rows"])
        for name, value in (("micro", setting["micro"]), ("group", options.group)):
            if setting["rows"] % value:
                raise UserError(f"--rows {setting['rows']}: must be a multiple of --{name} {value}.")
    return [{"case": case, **setting} for case in options.case for setting in settings]


def sides_of(setting: dict[str, Any], options: Any) -> dict[str, dict[str, Any]]:
    """The sides of a case, with what each is given beside the setting."""
    case, pairs, last = setting["case"], {"pairs_at_once": options.folded}, setting["steps"] - 1
    if case == "ddpo":
        fast = {**pairs, "sampler": "cps", "solver": "dpm", "window_size": 2}
        sides = {"ours": {}, "trl": {}, "folded": pairs, "fast": fast}
    else:
        middle = {"truncated_backprop_timestep": setting["steps"] // 2}
        again = {**middle, "checkpoint_steps": True}
        sides = {"ours": again, "trl": middle, "kept": middle, "last": {"truncated_backprop_timestep": last}}
    asked = options.side or list(sides)
    return {side: {"case": case, **own} for side, own in sides.items() if side == "ours" or side in asked}


def prepare(setting: dict[str, Any], folder: Path, options: Any) -> None:
    """Write into a folder what the workers read: the pipeline and the prompts."""
    import torch
    from diffusers import UNet2DConditionModel

    from shared.builtin.make_diffusion import new_sd, new_vae

    torch.manual_seed(0)
    pipeline = new_sd(new_vae())
    config = dict(pipeline.unet.config)
    config["sample_size"] = setting["size"] // pipeline.vae_scale_factor
    config["block_out_channels"] = [setting["width"] * channels for channels in config["block_out_channels"]]
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.save_pretrained(folder / "model")
    facts = {name: getattr(options, name) for name in ("group", "guidance", "threads", "block_steps")}
    facts |= {"lr": LR, "seed": 0, "reward": "brightness", "prompts": PROMPTS, "held_out": []}
    text = json.dumps({**setting, **facts, "sides": sides_of(setting, options)})
    (folder / "setting.json").write_text(text, encoding="utf-8")


def figures_of(setting: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """One record for each side."""
    sides = sides_of(setting, options)
    pythons = {side: options.trl_python if side == "trl" else sys.executable for side in sides}
    pythons = {side: python for side, python in pythons.items() if python}
    differences: dict[str, float] = {}

    def check(first: dict[str, list[dict[str, float]]]) -> None:
        same = {side: told for side, told in first.items() if side in SAME}
        differences.update(check_same(same, {"reward": 1e-4, "grad_norm": 1e-2}))

    told = told_of(setting, options, WORKER, pythons, prepare, check)
    agreement = {f"{name} differs by": value for name, value in differences.items()}
    return [{**setting, **_figure(setting, by, told, options), **agreement} for by in told]


def _figure(setting: dict[str, Any], by: str, told: dict[str, list[dict]], options: Any) -> dict[str, Any]:
    figure = figure_of(by, told, options)
    pictures = setting["rows"]
    generation = median(told[by], "generation") / options.block_steps if "generation" in told[by][0] else 0.0
    return {
        **figure,
        "sampling": pictures / generation if generation else math.nan,
        "training": pictures / (figure["seconds"] - generation),
        "both": pictures / figure["seconds"],
        "generation": generation,
        "guidance": options.guidance, "group": options.group, "folded": options.folded,
    }  # fmt: skip


def main() -> None:
    options = arguments()
    tell(settings_of(options), figures_of, options, header=HEADER, row=ROW)


if __name__ == "__main__":
    run_command(main)
