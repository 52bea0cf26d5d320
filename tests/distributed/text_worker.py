"""The text trainers in one launch: their losses and held-out figures as JSON, written by process 0.

accelerate launch --config_file PROFILE text_worker.py FOLDER MODEL TRAINER...
"""

import json
import os
import sys
from pathlib import Path

from shared.runtime.command import run_command

GLOBAL_BATCH, STEPS, COUNT = 8, 6, 30  # the fourth step of an epoch has 6 rows
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")


def main() -> None:
    folder, model, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    facts = {name: train(name, model, folder / name) for name in names}
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def pair(number: int) -> dict:
    shape = SHAPES[number % 3]
    return {
        "prompt": turn("user", f"What colour is {'the ' * (number % 4)}{shape}?"),
        "chosen": turn("assistant", " ".join([COLOURS[number % 4]] * (1 + number % 2))),
        "rejected": turn("assistant", f"{shape} {SHAPES[(number + 1) % 3]}"),
    }


def single(number: int) -> dict:
    row = pair(number)
    return {"prompt": row["prompt"], "completion": row["chosen" if number % 2 else "rejected"], "label": number % 2}


def conversation(number: int) -> dict:
    row = pair(number)
    return {"messages": [*row["prompt"], *row["chosen"]]}


def steps(number: int) -> dict:
    return {"prompt": "How many?", "completions": ["one two", "three"], "labels": [True, bool(number % 2)]}


ROWS = {"SFT": conversation, "GKD": conversation, "KTO": single, "BCO": single, "PRM": steps}
OPTIONS = {
    "SFT": {"packing": True, "max_length": 48, "per_device_train_batch_size": 2},
    "KTO": {"loss_type": "apo_zero_unpaired"},
    "GKD": {
        "lmbda": 0.5,
        "seq_kd": True,
        "max_new_tokens": 5,
        "loss_temperature": 0.05,
        "teacher_model_init_kwargs": {"num_hidden_layers": 1},
    },
    "DPO-cached": {"precompute_ref_log_probs": True},
    "DPO-synced": {"sync_ref_model": True, "ref_model_sync_steps": 2},
}


def train(name: str, model: str, folder: Path) -> dict:
    import textalign

    kind = name.partition("-")[0]
    make = ROWS.get(kind, pair)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": STEPS,
        "per_device_eval_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1, "eval_answers": 0,
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1.0, **OPTIONS.get(name, {}),
    }  # fmt: skip
    if name == "SFT":
        options["per_device_train_batch_size"] //= processes
    if kind == "GKD":
        options["teacher_model_name_or_path"] = model  # of which the option leaves one layer
    config = getattr(textalign, f"{kind}Config")(**options)
    peft = None
    if name == "DPO-adapter":
        from peft import LoraConfig

        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = getattr(textalign, f"{kind}Trainer")(
        model,
        args=config,
        train_dataset=[make(i) for i in range(COUNT)],
        eval_dataset=[make(i) for i in range(11)],
        peft_config=peft,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out": {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "epoch"))},
    }


if __name__ == "__main__":
    run_command(main)
