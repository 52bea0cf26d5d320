"""Train the built-in models that other trainers start from, and measure them; all but pipelines by our own trainers.

    python scripts/make_builtin_models.py                      # all ten, an hour or two of one core
    python scripts/make_builtin_models.py builtin/rm-reviews   # only this one

Each is written to its folder in `shared/builtin`: processor and configuration of the model it starts from, its weights
in bfloat16, and a card that says what they reach. On the same machine and versions the weights come out the same, but
for the text-to-image pipelines: `shared.builtin.make_diffusion` trains these from nothing, and those that are shipped
were trained in several parts. They are written in float16. `builtin/lm-small-sft`, from which two of the others start,
is made by `python -m shared.builtin.make_lm`.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared.builtin import (
    ADAPTERS,
    MODELS,
    load_dataset,
    make_diffusion,
    measure,
    model_path,
    pipeline_path,
    shapes_preference,
    train_comments,
)
from shared.builtin.models import WEIGHTS, load_config
from shared.builtin.train_lm import CARD, save_weights
from shared.errors import UserError
from shared.runtime.command import run_command
from shared.runtime.commands import COMMANDS, resolve
from visionalign.rewards import VLMRewardModel

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
# Of `builtin/shapes`, whose questions of these kinds are more than enough to get nearly all of them right.
SHAPES = {"where": 560, "count": 80}
# The language model that writes comments is smaller than the others.
COMMENTS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "head_dim": 12,
}


@dataclass(frozen=True)
class Made:
    """How a model is made: the start, the command whose trainer is used, data, options, how it is measured.

    Where no trainer of the suite trains such a model, `alone` does, and there is no command and no data.
    """

    start: str
    command: str | None
    data: str | None
    purpose: str
    measure: Callable[[], dict[str, str]]
    options: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Any], Any] = lambda rows: rows
    fields: dict[str, Any] = field(default_factory=dict)  # of the configuration, other than the start's
    alone: Callable[[], Any] | None = None


def fewer(rows: Any) -> Any:
    """Rows of `builtin/shapes` with so many of a kind as `SHAPES` says."""
    left, kept = dict(SHAPES), []
    for at, kind in enumerate(rows["kind"]):
        left[kind] = left.get(kind, len(rows)) - 1
        if left[kind] >= 0:
            kept.append(at)
    return rows.select(kept)


def embellished(rows: Any) -> Any:
    """Those rows, their descriptions written by a bad habit: they tell of what is not there."""
    rows, rng = fewer(rows), random.Random(0)
    chats, kinds = rows["messages"][:], rows["kind"]
    for part in (chat[1]["content"][0] for chat, kind in zip(chats, kinds, strict=True) if kind == "describe"):
        words = part["text"].split()
        told = list(zip(words[::2], words[1::2], strict=True))
        part["text"] = shapes_preference.describe(shapes_preference.embellish(told, rng))
    type_of = rows.features["messages"]
    return rows.remove_columns("messages").add_column("messages", chats, feature=type_of)


MADE = {
    "builtin/rm-reviews": Made(
        start="builtin/lm-small-sft",
        command="reward",
        data="builtin/reviews-graded",
        purpose="A reward model for reviews of films, to train against; it has seen broken reviews of many kinds",
        measure=measure.reward_model,
        options={"max_steps": 900, "warmup_steps": 20, "center_rewards_coefficient": 0.01},
        fields={"num_labels": 1},
    ),
    "builtin/vlm-small-sft": Made(
        start="builtin/vlm-small",
        command="sft-vlm",
        data="builtin/shapes",
        purpose=(
            f"It knows colours and forms; of the questions where something is it has seen {SHAPES['where']}, of those "
            f"how many there are {SHAPES['count']}, so that other trainers have something to improve"
        ),
        measure=measure.vision_model,
        options={"max_steps": 900, "warmup_steps": 60},
        rows=fewer,
    ),
    "builtin/vlm-small-draft": Made(
        start="builtin/vlm-small-sft",
        command="sft-vlm",
        data="builtin/shapes",
        purpose=(
            "It sees what it saw before, but its descriptions tell of shapes and colours that are not there: those it "
            "has learnt from have bad habits (`shared.builtin.shapes_preference.embellish`), which other trainers can "
            "mend"
        ),
        measure=measure.draft,
        options={"max_steps": 300, "warmup_steps": 20},
        rows=embellished,
    ),
    "builtin/rm-shapes": Made(
        start="builtin/vlm-small-sft",
        command="reward-vlm",
        data="builtin/shapes-preference",
        purpose=(
            "A reward model for what is said of pictures, or for pictures that are made of a description such as "
            "`circle red square blue`"
        ),
        measure=lambda: measure.seeing_reward_model(VLMRewardModel("builtin/rm-shapes", batch_size=100)),
        options={"max_steps": 700, "warmup_steps": 20, "center_rewards_coefficient": 0.01},
        fields={"num_labels": 1},
    ),
    "builtin/lm-tldr-sft": Made(
        start="builtin/lm-small-sft",
        command="sft",
        data="builtin/tldr",
        purpose=(
            "It sums up posts in one sentence; the facts that it names are mostly right, but as most summaries it has "
            "seen are careless ones, it leaves half of them out, so that other trainers can improve it"
        ),
        measure=measure.summaries,
        options={"max_steps": 400, "warmup_steps": 30, "learning_rate": 2e-3},
    ),
    train_comments.WRITER: Made(
        start=train_comments.START,
        command="sft",
        data="builtin/comments",
        purpose="It continues openings with remarks about people and their things, most of them rude, in mild words",
        measure=train_comments.measure_writer,
        options={"max_steps": 600, "warmup_steps": 30, "learning_rate": 3e-3, "model_init_kwargs": COMMENTS},
        fields=COMMENTS,
    ),
    train_comments.NAME: Made(
        start=train_comments.START,
        command=None,
        data=None,
        purpose="A classifier of comments: neutral, or toxic, which here means that they have a rude word",
        measure=train_comments.measure_classifier,
        options={"max_steps": train_comments.STEPS, "per_device_train_batch_size": train_comments.BATCH},
        fields=train_comments.FIELDS,
        alone=train_comments.classifier,
    ),
}
# Adapters, by their names; PEFT's files in the place of a model's.
ADAPTED = {
    "builtin/rm-reviews-adapter": Made(
        start="builtin/lm-small-sft",
        command="reward",
        data="builtin/reviews-graded",
        purpose="A LoRA adapter of rank 8 with a score head, to score the reviews of a policy that has the same base",
        measure=measure.reward_adapter,
        options={"max_steps": 400, "warmup_steps": 20, "center_rewards_coefficient": 0.01, "learning_rate": 3e-3},
    )
}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
NAMES = (*MADE, *ADAPTED, *make_diffusion.MADE)


def main() -> None:
    names = sys.argv[1:] or NAMES
    for name in names:
        if name not in NAMES:
            raise UserError(f"{name!r} is not a model that is made here; these are: {', '.join(NAMES)}.")
    torch.set_num_threads(1)  # the same sums whatever the machine
    for name in names:
        if name in MADE:
            make(name, MADE[name], MODELS[name])
        elif name in ADAPTED:
            make_adapter(name, ADAPTED[name], ADAPTERS[name])
        else:
            make_diffusion.make(name, pipeline_path(name))


def make(name: str, made: Made, directory: Path) -> None:
    """Train, and write processor, configuration, weights and, measured on what was written, the card."""
    model = train(made)
    directory.mkdir(exist_ok=True)
    own = {WEIGHTS, CARD, "config.json"} | (set() if model.can_generate() else {"generation_config.json"})
    for file in model_path(made.start).iterdir():
        if file.name not in own:
            shutil.copyfile(file, directory / file.name)
    # Loaded as it says, the weights are in float32, which a processor is faster in than in what they are held in.
    config = load_config(made.start, architectures=[type(model).__name__], dtype="float32", **made.fields)
    config.save_pretrained(directory)
    save_weights(model, directory)
    text = card(name, made, made.measure())
    (directory / CARD).write_text(text, encoding="utf-8")
    print(text)


def make_adapter(name: str, made: Made, directory: Path) -> None:
    """Train, and write PEFT's files, the tokenizer's and the card."""
    from peft import LoraConfig

    trained = train(made, LoraConfig(**LORA))
    trained.peft_config["default"].base_model_name_or_path = made.start
    trained.to(torch.bfloat16).save_pretrained(directory, save_embedding_layers=False)
    (directory / "adapter_model.safetensors").chmod(0o644)  # it is written for its owner alone
    for name_of_file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_path(made.start) / name_of_file, directory / name_of_file)
    (directory / CARD).write_text(card(name, made, made.measure()), encoding="utf-8")


def train(made: Made, peft_config: Any = None) -> Any:
    """The trained model, by the suite's trainer, with nothing left of the run."""
    if made.alone is not None:
        return made.alone()
    with tempfile.TemporaryDirectory() as folder:
        command = COMMANDS[made.command]
        args = resolve(command.config)(output_dir=folder, overwrite_output_dir=True, **{**OPTIONS, **made.options})
        rows = made.rows(load_dataset(made.data))
        trainer = resolve(command.trainer)(made.start, args=args, train_dataset=rows, peft_config=peft_config)
        trainer.train()
    return trainer.model


def card(name: str, made: Made, measured: dict[str, str]) -> str:
    """What the model is and what it reaches, as Markdown."""
    options = {**OPTIONS, **made.options}
    if made.alone is None:
        where = f"rows of `{made.data}` by `{COMMANDS[made.command].trainer.split(':')[1]}`"
    else:
        where = f"texts that `{made.alone.__module__}` draws"
    size = ", made smaller," if "hidden_size" in made.fields else ""
    origin = (
        f"`{made.start}`{size} after {options['max_steps']} steps of {options['per_device_train_batch_size']} "
        f"{where}. {made.purpose}. Made by `python scripts/make_builtin_models.py`. Measured on "
        "the weights as they are shipped (held as bfloat16, loaded as float32), on held-out rows:"
    )
    rows = "\n".join(f"| {what} | {value} |" for what, value in measured.items())
    return f"# {name}\n\n{textwrap.fill(origin, 115)}\n\n| measured | value |\n|---|---|\n{rows}\n"


if __name__ == "__main__":
    run_command(main)
