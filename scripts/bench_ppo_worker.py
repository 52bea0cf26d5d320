"""One side of bench_ppo.py, in a process of its own: PPO by adapters on one base, or by models.

    python scripts/bench_ppo_worker.py ours FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from bench_turns import Turns, answering

ADAPTER, MODEL = "adapter:{folder}/reward", "{folder}/reward"
# side -> kind of critic, whether the policy is an adapter, the reward
SIDES = {
    "ours": ("adapter", True, ADAPTER),
    "head": ("shared", True, ADAPTER),
    "lora": ("separate", True, MODEL),
    "whole": ("separate", False, MODEL),
}


def build(by: str, setting: dict[str, Any], folder: Path) -> Any:
    """The trainer of a side."""
    from peft import LoraConfig

    from textalign.ppo import PPOConfig, PPOTrainer

    kind, adapter, reward = SIDES[by]
    draw = random.Random(0)
    words = [f"w{at}" for at in range(3, setting["vocab"])]
    rows = [{"prompt": " ".join(draw.choices(words, k=setting["prompt"]))} for _ in range(256)]
    args = PPOConfig(
        output_dir=str(folder / by), learning_rate=1e-6, lr_scheduler_type="constant", bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, max_steps=1_000_000, per_device_train_batch_size=setting["rows"],
        num_iterations=setting["epochs"], max_completion_length=setting["completion"], value_model=kind,
        eval_answers=0, sample_every=0, logging_first_step=True, logging_steps=1_000_000, shuffle_dataset=False,
    )  # fmt: skip
    lora = LoraConfig(r=setting["rank"], target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = PPOTrainer(
        str(folder / "model"), reward.format(folder=folder), args, train_dataset=rows, peft_config=lora
    )
    torch.set_num_threads(setting["threads"])
    return trainer


def parameters(trainer: Any) -> int:
    """Of all models that the trainer holds, each weight once."""
    held = [trainer.model, getattr(trainer.reference, "model", None)]
    for reward in trainer.rewards.rewards:
        of = getattr(reward, "function", reward)
        held += [getattr(of, "model", None)]
    found = {id(each): each.numel() for model in held if model is not None for each in model.parameters()}
    return sum(found.values())


def main() -> None:
    by, folder = sys.argv[1], Path(sys.argv[2])
    said = answering()
    setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    torch.set_num_threads(setting["threads"])
    import textalign.ppo  # noqa: F401 - libraries are no part of what is measured

    turns = Turns(said, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    turns.loaded()
    trainer = build(by, setting, folder)
    turns.facts["parameters"] = parameters(trainer)
    turns.steps = setting["block_steps"] * setting["epochs"]
    turns.watch(trainer, "reward")
    turns.begin()
    trainer.train()


if __name__ == "__main__":
    main()
