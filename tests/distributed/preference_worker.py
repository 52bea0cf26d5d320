"""VLM DPO in one launch: its losses and held-out figures as JSON, written by process 0.

accelerate launch --config_file PROFILE preference_worker.py FOLDER MODEL RUN...
"""

import json
import os
import sys
from pathlib import Path

from shared.runtime.command import run_command

sys.path.append(str(Path(__file__).parent.parent))  # last: its folders bear the packages' names

GLOBAL_BATCH, STEPS, COUNT = 4, 4, 10  # the third step of an epoch has 2 rows
OPTIONS = {
    "plain": {},
    "adapter": {},
    "cached": {"precompute_ref_log_probs": True},
    "images": {"image_loss_weight": 1.0, "anchor_loss_weight": 1.0},
    "images-cached": {"image_loss_weight": 1.0, "precompute_ref_log_probs": True},
}


def main() -> None:
    folder, model, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    facts = {name: train(name, model, folder / name) for name in names}
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def train(name: str, model: str, folder: Path) -> dict:
    from tiny_pairs import history, pairs_about

    from visionalign import VLMDPOConfig, VLMDPOTrainer

    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": STEPS,
        "per_device_eval_batch_size": 2, "learning_rate": 2e-3, "logging_steps": 1, "eval_answers": 0,
        "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1.0, **OPTIONS[name],
    }  # fmt: skip
    peft = None
    if name == "adapter":
        from peft import LoraConfig

        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = pairs_about("paligemma", COUNT)  # an image in each
    trainer = VLMDPOTrainer(
        model,
        args=VLMDPOConfig(**options),
        train_dataset=rows,
        eval_dataset=rows[:5],
        peft_config=peft,
    )
    trainer.train()
    held_out = {key: value for key, value in trainer.evaluate().items() if "loss" in key or "rewards" in key}
    return {"losses": history(trainer, "loss"), "held_out": held_out}


if __name__ == "__main__":
    run_command(main)
