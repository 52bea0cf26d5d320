"""What papers say of DDPO and AlignProp, in miniature on `builtin/sd-small`: runs over seeds, and a plot.

- advantages: DDPO with rewards compared within a prompt's group, with the last ones of the prompt, with all of the
  round, or not at all (the bare reward).
- queries: how many pictures are judged on the way to a reward, by DDPO and by AlignProp.
- too_long: AlignProp for brightness far beyond what is wanted: the reward goes on rising while the forms that the
  prompts ask for, and the differences between pictures, are lost.

All train with what `scripts/ddpo.py` and `scripts/alignprop.py` have when they are given no arguments, but for the
learning rate, which stays. Held-out prompts with fixed seeds are evaluated as the trainers do it. Runs are made one
after another, each in a process of its own; a file of each run is kept in `--folder`, and a run that is there already
is not made again. Needs no network; the plot needs matplotlib.

    python scripts/compare_diffusion.py                                    # an hour or two on two cores
    python scripts/compare_diffusion.py --runs group raw --seeds 0 --ddpo_steps 10
    python scripts/compare_diffusion.py --plot_only                        # of what is in the folder

Written: `--output`.json, and `--output`.png with the mean over seeds, and the lowest and the highest as a band.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.builtin import recipe
from shared.errors import UserError
from shared.runtime.command import run_command

ROOT = Path(__file__).resolve().parents[1]
ADVANTAGES = ("group", "prompt", "batch", "raw")
RUNS = (*ADVANTAGES, "alignprop", "too_long")
LABELS = {
    "group": "group of the prompt", "prompt": "last ones of the prompt", "batch": "whole round", "raw": "none",
    "alignprop": "AlignProp", "too_long": "AlignProp for brightness",
}  # fmt: skip
FORM = "right_form"
SHARED = {
    "bf16": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "eval_strategy": "steps",
    "eval_on_start": True, "eval_answers": 0, "sample_every": 0, "logging_steps": 5,
    "lr_scheduler_type": "constant",  # so that a run of other length has the same beginning
}  # fmt: skip
NOT_OPTIONS = ("model_name_or_path", "dataset_name", "reward_funcs", "reward_weights", "use_peft")  # given otherwise


def options_of(script: str) -> dict[str, Any]:
    """What the script trains with when it is given no arguments, beside model, data and rewards; and `SHARED`."""
    own = yaml.safe_load(recipe(script)({}).read_text(encoding="utf-8"))
    assert own["use_peft"] is False, "the runs here train the whole denoiser"
    return {name: value for name, value in own.items() if name not in NOT_OPTIONS} | SHARED


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ddpo_steps", type=int, default=45, help="optimizer steps")
    parser.add_argument("--alignprop_steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--too_long_steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--evaluations", type=int, default=9, help="of a run, beside that of its start")
    parser.add_argument("--held_out", type=int, default=64, help="pictures of an evaluation")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", default="outputs/compare_diffusion", help="of the runs")
    parser.add_argument("--output", default=str(ROOT / "docs" / "compare_diffusion"), help="without suffix")
    parser.add_argument("--plot_only", action="store_true")
    return parser.parse_args()


# ---- One run --------------------------------------------------------------------------------------------------------


def trainer_of(facts: dict[str, Any], own_folder: str) -> Any:
    from shared.builtin import load_dataset

    train, held_out = (load_dataset("builtin/picture-prompts", split) for split in ("train", "test"))
    rewards = ["brightness_reward" if facts["run"] == "too_long" else "colour_reward", FORM]
    options = {
        **options_of("ddpo" if facts["run"] in ADVANTAGES else "alignprop"),
        "output_dir": own_folder, "seed": facts["seed"], "max_steps": facts["steps"],
        "eval_steps": max(1, facts["steps"] // facts["evaluations"]), "reward_weights": [1.0, 0.0],
    }  # fmt: skip
    data = {"train_dataset": train, "eval_dataset": held_out.select(range(facts["held_out"]))}
    if facts["run"] in ADVANTAGES:
        return ddpo(facts["run"], rewards, options, data)
    from diffusionalign import AlignPropConfig, AlignPropTrainer

    return AlignPropTrainer("builtin/sd-small", rewards, AlignPropConfig(**options), **data, peft_config=None)


def ddpo(advantages: str, rewards: list[str], options: dict[str, Any], data: dict[str, Any]) -> Any:
    from diffusionalign import DDPOConfig, DDPOTrainer
    from shared.objectives.advantages import weighted_rewards

    class BareRewards(DDPOTrainer):
        def advantages(self, rewards_BK: Any, penalty_B: Any) -> Any:
            return weighted_rewards(rewards_BK, self.rewards.weights.to(rewards_BK.device))

    own = {} if advantages == "raw" else {"advantages": advantages}
    trainer_class = BareRewards if advantages == "raw" else DDPOTrainer
    return trainer_class("builtin/sd-small", rewards, DDPOConfig(**options, **own), **data, peft_config=None)


def one_run(facts: dict[str, Any], own_folder: str) -> dict[str, Any]:
    """Train, and tell what the evaluations found."""
    import torch

    trainer = trainer_of(facts, own_folder)
    torch.set_num_threads(facts["threads"])
    started = time.process_time()
    trainer.train()
    pictures = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    points = [
        {
            "step": entry["step"],
            "queries": entry["step"] * pictures,
            "reward": entry["eval_reward"],
            "form": entry[f"eval_rewards/{FORM}/mean"],
        }
        for entry in trainer.state.log_history
        if "eval_reward" in entry
    ]
    logged = [entry for entry in trainer.state.log_history if "sample_diversity" in entry]
    diversity = [(entry["step"], entry["sample_diversity"]) for entry in logged]
    return {**facts, "points": points, "diversity": diversity, "cpu_seconds": time.process_time() - started}


# ---- All runs -------------------------------------------------------------------------------------------------------


def run_all(options: Any, folder: Path) -> None:
    """Make the runs that are not there yet.

    Raises:
        UserError: one of them failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = dict.fromkeys(ADVANTAGES, options.ddpo_steps)
    steps |= {"alignprop": options.alignprop_steps, "too_long": options.too_long_steps}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    for seed in options.seeds:
        for run in options.runs:
            result = folder / f"{run}-{seed}.json"
            if result.is_file():
                continue
            facts = {name: getattr(options, name) for name in ("evaluations", "held_out", "threads")}
            facts |= {"run": run, "seed": seed, "steps": steps[run], "result": str(result)}
            with result.with_suffix(".log").open("w") as log:
                words = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(facts)]
                if subprocess.run(words, stdout=log, stderr=log, env=environment, check=False).returncode:
                    raise UserError(f"{result.stem} failed; {log.name} tells why.")
            made = json.loads(result.read_text())
            first, last = made["points"][0]["reward"], made["points"][-1]["reward"]
            print(f"{result.stem}: {first:.3f} → {last:.3f} in {made['cpu_seconds']:.0f} CPU-seconds", flush=True)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind of run: the reward, and the share of right forms, of each seed at each evaluation."""
    found: dict[str, dict[str, Any]] = {}
    for name in RUNS:
        same = [run for run in runs if run["run"] == name]
        if same:
            rewards, forms = (
                [[point[what] for point in run["points"]] for run in same] for what in ("reward", "form")
            )
            found[name] = {
                "seeds": [run["seed"] for run in same],
                "steps": [point["step"] for point in same[0]["points"]],
                "queries": [point["queries"] for point in same[0]["points"]],
                "reward": rewards,
                "form": forms,
                "mean": [statistics.mean(values) for values in zip(*rewards, strict=True)],
                "diversity": [run["diversity"] for run in same],
                "cpu_seconds": [round(run["cpu_seconds"], 1) for run in same],
            }
    return found


def plot(curves: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 3.8))

    def line(axis: Any, across: list[float], table: list[list[float]], label: str, **style: Any) -> None:
        columns = list(zip(*table, strict=True))
        (drawn,) = axis.plot(across, list(map(statistics.mean, columns)), label=label, **style)
        axis.fill_between(across, list(map(min, columns)), list(map(max, columns)), color=drawn.get_color(), alpha=0.2)

    for name in ADVANTAGES:
        if name in curves:
            line(axes[0], curves[name]["queries"], curves[name]["reward"], LABELS[name])
    for name, label in (("group", "DDPO"), ("alignprop", "AlignProp")):
        if name in curves:
            line(axes[1], curves[name]["queries"], curves[name]["reward"], label)
    if "too_long" in curves:
        own = curves["too_long"]
        line(axes[2], own["queries"], own["reward"], "reward: brightness")
        line(axes[2], own["queries"], own["form"], "right form")
        table = [[value for _, value in seed] for seed in own["diversity"]]
        pictures = own["queries"][-1] / own["steps"][-1]
        line(axes[2], [step * pictures for step, _ in own["diversity"][0]], table, "diversity", linestyle=":")
    titles = ("DDPO: what rewards are compared with", "reward queries", "AlignProp, far too long")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("pictures judged")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("held-out reward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    folder = Path(options.folder).resolve()
    if not options.plot_only:
        run_all(options, folder)
    curves = summary([json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))])
    if not curves:
        raise UserError(f"{folder} holds no runs: leave out --plot_only.")
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    used = {script: options_of(script) for script in ("ddpo", "alignprop")}
    text = json.dumps({"options": used, "curves": curves}, indent=1)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    plot(curves, output.with_suffix(".png"))
    print(f"Written: {output}.json, {output}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        asked = json.loads(sys.argv[2])
        with tempfile.TemporaryDirectory() as name:
            Path(asked["result"]).write_text(json.dumps(one_run(asked, name)), encoding="utf-8")
    else:
        run_command(main)
