"""Learning curves of GRPO and RLOO on built-in arithmetic, here and by trl: same model, data, reward and options.

Held-out accuracy (greedy, an exact match of the answer) as training goes on, over several seeds; the same code
measures it on both sides. Runs are made one after another, each in a process of its own; a file of each run is kept
in `--folder`, and a run that is there already is not made again. Needs no network; the plot needs matplotlib.

    python scripts/learning_curves.py --trl_python path/to/an/environment/bin/python    # an hour on two cores
    python scripts/learning_curves.py --seeds 0 1 --algorithms grpo --steps 100         # here alone
    python scripts/learning_curves.py --plot_only                                       # of what is in the folder

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("grpo", "rloo")
NAMES = {"ours": "this suite", "trl": "trl"}
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 256, "num_generations": 8, "learning_rate": 1.2e-4, "warmup_steps": 10,
    "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": False,
    "max_completion_length": 8, "temperature": 0.7, "logging_steps": 25, "save_strategy": "no", "report_to": [],
    "disable_tqdm": True,
}  # fmt: skip
OWN = {"grpo": {"loss_type": "dapo", "beta": 0.0, "scale_rewards": "group"}, "rloo": {"beta": 0.01}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="a Python interpreter that has trl; without it trl is left out")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25, help="steps from one measurement to the next")
    parser.add_argument("--batch", type=int, default=OPTIONS["per_device_train_batch_size"], help="samples of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--folder", default="outputs/learning_curves", help="of the runs")
    parser.add_argument("--output", default=str(ROOT / "docs" / "learning_curves"), help="without suffix")
    parser.add_argument("--plot_only", action="store_true")
    return parser.parse_args()


# ---- One run; nothing of this project is imported for trl's ---------------------------------------------------------


def accuracy(completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
    """1 where a completion is the solution and nothing else."""
    texts = (completion[0]["content"].strip() for completion in completions)
    return [float(text == expected) for text, expected in zip(texts, solution, strict=True)]


def held_out_accuracy(model: Any, tokenizer: Any, rows: list[dict]) -> float:
    """Of the most likely answers."""
    import torch

    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=OPTIONS["max_completion_length"], do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    model.train(was_training)
    answers = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return statistics.mean(accuracy(completions, [row["solution"] for row in rows]))


def one_run(facts: dict[str, Any], own_folder: str) -> dict[str, Any]:
    """Train, and measure at the start and every so many steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    folder, algorithm = Path(facts["folder"]), facts["algorithm"]
    rows, held_out = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "test"))
    model = AutoModelForCausalLM.from_pretrained(facts["model"], dtype=torch.float32)  # the file has half of that
    tokenizer = AutoTokenizer.from_pretrained(facts["model"])
    options = {
        **OPTIONS, **OWN[algorithm], "output_dir": own_folder, "seed": facts["seed"],
        "max_steps": facts["steps"], "per_device_train_batch_size": facts["batch"],
    }  # fmt: skip
    if facts["by"] == "trl":
        import trl as library

        options |= {"gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available()}
    else:
        import textalign as library

        options |= {"eval_answers": 0, "sample_every": 0}
    config, trainer_class = (getattr(library, algorithm.upper() + end) for end in ("Config", "Trainer"))
    trainer = trainer_class(
        model, accuracy, config(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    torch.set_num_threads(facts["threads"])
    points, measuring = [], 0.0

    class Measure(TrainerCallback):
        def measure(self, state):
            nonlocal measuring
            started = time.process_time()
            points.append((state.global_step, held_out_accuracy(trainer.model, tokenizer, held_out)))
            measuring += time.process_time() - started

        def on_train_begin(self, args, state, control, **kwargs):
            self.measure(state)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % facts["every"] == 0 or state.global_step == facts["steps"]:
                self.measure(state)

    trainer.add_callback(Measure())
    started = time.process_time()
    trainer.train()
    rewards = [(entry["step"], entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    seconds = time.process_time() - started - measuring
    return {**facts, "accuracy": points, "reward": rewards, "cpu_seconds": seconds}


# ---- All runs -------------------------------------------------------------------------------------------------------


def run_all(options: Any, folder: Path) -> None:
    """Make the runs that are not there yet."""
    import shared.builtin
    from shared.builtin import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [dict(row) for row in load_dataset("builtin/arithmetic-prompts", split)]
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    pythons = {"ours": sys.executable} | ({"trl": options.trl_python} if options.trl_python else {})
    names = ("steps", "every", "batch", "threads")
    for seed in options.seeds:
        for algorithm in options.algorithms:
            for by, python in pythons.items():
                facts = {name: getattr(options, name) for name in names}
                facts |= {"by": by, "algorithm": algorithm, "seed": seed, "folder": str(folder)}
                facts["model"] = str(Path(shared.builtin.__file__).parent / "lm_small_sft")
                _make(python, facts, folder / f"{algorithm}-{by}-{seed}.json")


def _make(python: str, facts: dict[str, Any], result: Path) -> None:
    from shared.errors import UserError

    if result.is_file():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(facts["threads"]), "HF_HUB_OFFLINE": "1"}
    with result.with_suffix(".log").open("w") as log:
        words = [python, str(Path(__file__).resolve()), "--run", json.dumps({**facts, "result": str(result)})]
        if subprocess.run(words, stdout=log, stderr=log, env=environment, check=False).returncode:
            raise UserError(f"{result.stem} failed; {log.name} tells why.")
    run = json.loads(result.read_text())
    print(f"{result.stem}: {run['accuracy'][-1][1]:.3f} after {run['cpu_seconds']:.0f} CPU-seconds", flush=True)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves: accuracy of each seed at each step, and their mean."""
    curves = []
    for algorithm in ALGORITHMS:
        for by in NAMES:
            same = [run for run in runs if (run["algorithm"], run["by"]) == (algorithm, by)]
            if not same:
                continue
            table = [[value for _, value in run["accuracy"]] for run in same]
            curves.append(
                {
                    "algorithm": algorithm, "by": by, "seeds": [run["seed"] for run in same],
                    "steps": [step for step, _ in same[0]["accuracy"]], "accuracy": table,
                    "mean": [statistics.mean(values) for values in zip(*table, strict=True)],
                    "cpu_seconds": [round(run["cpu_seconds"], 1) for run in same],
                }
            )  # fmt: skip
    return curves


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in ALGORITHMS if any(curve["algorithm"] == name for curve in curves)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 3.6), sharey=True, squeeze=False)
    for axis, algorithm in zip(axes[0], shown, strict=True):
        for curve in (each for each in curves if each["algorithm"] == algorithm):
            color = {"ours": "tab:blue", "trl": "tab:orange"}[curve["by"]]
            columns = list(zip(*curve["accuracy"], strict=True))
            axis.plot(curve["steps"], curve["mean"], color=color, label=NAMES[curve["by"]])
            axis.fill_between(curve["steps"], list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2)
        axis.set_title(f"{algorithm.upper()}, {len(curve['seeds'])} seeds: mean, lowest, highest")
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("held-out accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_here(facts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as own_folder:
        result = one_run(facts, own_folder)
    Path(facts["result"]).write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    options = arguments()
    folder = Path(options.folder).resolve()
    if not options.plot_only:
        run_all(options, folder)
    paths = sorted(folder.glob("*-*-*.json"))
    curves = summary([json.loads(path.read_text()) for path in paths])
    output = Path(options.output)
    common = {**OPTIONS, **OWN}
    text = json.dumps({"options": common, "curves": curves}, indent=1)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    plot(curves, output.with_suffix(".png"))
    print(f"Written: {output}.json, {output}.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:  # maybe in an interpreter that does not know this project
        run_here(json.loads(sys.argv[2]))
    else:
        from shared.runtime.command import run_command

        run_command(main)
