"""Distillation beside supervised fine-tuning, in miniature: the default run of scripts/gkd.py over seeds, and a plot.

A small model that has lost its last layer learns again, from the whole model or from answers:

- sft: from the data's answers, which are all right.
- seq_sft: from answers that the whole model wrote once, at temperature 1 (sequence-level distillation).
- gkd_0, gkd_0.5, gkd_1: from the whole model's distributions, on the data's answers, on half of them, or on its own
  answers alone.

All see the same questions in the same order, with the options of the default run. Held-out questions are answered
greedily; divergence and agreement are at the tokens of the right answers. Needs no network; the plot needs matplotlib.

    python scripts/compare_gkd.py                           # about ten minutes of one core
    python scripts/compare_gkd.py --runs sft gkd_1 --seeds 0 --steps 50
    python scripts/compare_gkd.py --plot_only               # of what is in the file

Written: `--output`.json, after each run, and `--output`.png with the mean over seeds, and the lowest and the highest
as a band. Runs that are in the file are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.runtime.command import run_command

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"gkd_0": 0.0, "gkd_0.5": 0.5, "gkd_1": 1.0}
RUNS = ("sft", "seq_sft", *SHARES)
LABELS = {
    "sft": "SFT, right answers", "seq_sft": "SFT, teacher's answers", "gkd_0": "GKD, λ = 0",
    "gkd_0.5": "GKD, λ = ½", "gkd_1": "GKD, λ = 1",
}  # fmt: skip
FIGURES = {"accuracy": "right answers", "agreement": "agreement with the teacher", "loss": "divergence (nats a token)"}
OF_GKD = ("teacher_model_name_or_path", "lmbda", "beta", "temperature")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--output", default=str(ROOT / "docs" / "compare_gkd"), help="without suffix")
    parser.add_argument("--plot_only", action="store_true")
    return parser.parse_args()


# ---- Runs -----------------------------------------------------------------------------------------------------------


def recipe() -> dict[str, Any]:
    import yaml

    from shared.builtin import RECIPES

    return yaml.safe_load((RECIPES / "gkd.yaml").read_text(encoding="utf-8"))


class Measured:
    """The options, rows and models of all runs."""

    def __init__(self, steps: int, every: int, folder: str):
        from shared.builtin import load_dataset

        self.options = recipe()
        self.student, self.init = self.options.pop("model_name_or_path"), self.options.pop("model_init_kwargs")
        self.teacher, data = self.options["teacher_model_name_or_path"], self.options.pop("dataset_name")
        self.rows, self.held_out = load_dataset(data), load_dataset(data, "test")
        self.options |= {"max_steps": steps, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                         "logging_steps": every, "overwrite_output_dir": True}  # fmt: skip
        self.every, self.folder = every, folder

    def figures(self, model: Any, name: str) -> dict[str, float]:
        """Of held-out questions, by the trainer's own measurement."""
        from textalign import GKDConfig, GKDTrainer

        args = GKDConfig(output_dir=f"{self.folder}/measure", **self.options)
        told = {"train_dataset": self.rows, "eval_dataset": self.held_out, "processing_class": tokenizer(self.student)}
        measuring = GKDTrainer(model, self.teacher, args, **told)
        measuring.model.eval()
        found, _ = measuring.answer_questions()
        print(name, *(f"{key} {found[key]:.4f}" for key in FIGURES), flush=True)
        return {key: found[key] for key in FIGURES}

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One training, measured on the way: figure -> its values at the steps."""
        import torch
        from transformers import TrainerCallback

        from shared.builtin.models import load_model
        from textalign import GKDConfig, GKDTrainer, SFTConfig, SFTTrainer

        model = load_model(self.student, head="causal-lm", **self.init)
        told = {"train_dataset": self.rows, "processing_class": tokenizer(self.student)}
        options = {**self.options, "output_dir": f"{self.folder}/run", "seed": seed, "eval_answers": 0}
        if name in SHARES:
            trainer = GKDTrainer(model, self.teacher, GKDConfig(**{**options, "lmbda": SHARES[name]}), **told)
        else:
            if name == "seq_sft":
                told["train_dataset"] = self.answered(seed)
            plain = {key: value for key, value in options.items() if key not in OF_GKD}
            trainer = SFTTrainer(model, SFTConfig(**plain, assistant_only_loss=True), **told)
        curve = {"steps": [0], **{key: [value] for key, value in self.figures(model, name).items()}}

        class Measure(TrainerCallback):
            def on_step_end(_, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: N805
                if state.global_step % self.every == 0:
                    training, kept = model.training, torch.get_rng_state()
                    for key, value in self.figures(model, f"{name} {seed} {state.global_step}").items():
                        curve[key].append(value)
                    curve["steps"].append(state.global_step)
                    model.train(training)
                    torch.set_rng_state(kept)

        trainer.add_callback(Measure())
        trainer.train()
        return curve

    def answered(self, seed: int) -> list[dict[str, Any]]:
        """The training questions with the teacher's answers."""
        import torch

        from shared.builtin.models import load_model
        from shared.runtime.generation import InProcessGenerator, Sampling

        own = tokenizer(self.student)
        teacher = load_model(self.teacher, head="causal-lm").eval()
        asked = [row["messages"][:1] for row in self.rows]
        shape = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        inputs = dict(own.apply_chat_template(asked, tokenizer_kwargs={"padding_side": "left"}, **shape))
        sampling = Sampling(max_new_tokens=self.options["max_new_tokens"], temperature=1.0)
        random = torch.Generator().manual_seed(seed)
        done = InProcessGenerator(own, max_rows=1024).generate(teacher, inputs, 1, sampling, random=random)
        texts = own.batch_decode(done.ids, skip_special_tokens=True)
        said = [{"role": "assistant", "content": text.strip() or "0"} for text in texts]
        return [{"messages": [*turn, answer]} for turn, answer in zip(asked, said, strict=True)]


def tokenizer(name: str) -> Any:
    from shared.builtin.models import load_processor

    return load_processor(name)


def run_all(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    import torch

    from shared.builtin.models import load_model

    torch.set_num_threads(1)
    made = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(options.steps, options.every, folder)
        made["options"] = measured.options
        if "teacher" not in made:
            made["teacher"] = measured.figures(load_model(measured.teacher, head="causal-lm"), "teacher")
        for seed in options.seeds:
            for name in options.runs:
                runs = made["runs"].setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = measured.run(name, seed)
                    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


# ---- What they reached ----------------------------------------------------------------------------------------------


def table(made: dict[str, Any]) -> str:
    """Mean ± spread over seeds at the last step, as Markdown; no spread of one seed."""
    lines = [f"| | seeds | {' | '.join(FIGURES.values())} |", f"|---|---|{'---|' * len(FIGURES)}"]
    of_teacher = (f"{made['teacher'][key]:.1%}" if key == "accuracy" else "" for key in FIGURES)
    lines.append(f"| teacher | | {' | '.join(of_teacher)} |")
    for name in [each for each in RUNS if made["runs"].get(each)]:
        cells = []
        for key in FIGURES:
            last = [run[key][-1] for run in made["runs"][name].values()]
            mean, share = statistics.mean(last), key != "loss"
            cell = f"{mean:.1%}" if share else f"{mean:.4f}"
            if len(last) > 1:
                spread = statistics.stdev(last)
                cell += f" ± {100 * spread:.1f}" if share else f" ± {spread:.4f}"
            cells.append(cell)
        lines.append(f"| {LABELS[name]} | {len(last)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(made: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(4.2 * len(FIGURES), 3.6))
    for axis, (key, title) in zip(axes, FIGURES.items(), strict=True):
        for name in [each for each in RUNS if made["runs"].get(each)]:
            runs = list(made["runs"][name].values())
            columns = list(zip(*(run[key] for run in runs), strict=True))
            (line,) = axis.plot(runs[0]["steps"], list(map(statistics.mean, columns)), label=LABELS[name])
            axis.fill_between(
                runs[0]["steps"], list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.2
            )
        if key == "accuracy":
            axis.axhline(made["teacher"][key], color="grey", linestyle=":", label="teacher")
        if key == "loss":
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="lower left", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    path = Path(f"{options.output}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.plot_only and not path.is_file():
        raise UserError(f"{path} is not there: leave out --plot_only.")
    made = json.loads(path.read_text()) if options.plot_only else run_all(options, path)
    print(table(made))
    plot(made, path.with_suffix(".png"))
    print(f"Written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main)
