"""Measure a round of PPO with three adapters on one base against PPO with models of their own, and with a shared head.

All start from the same policy and have the same prompts, reward and options, float32; that their first rewards are the
same is checked. Each runs in a process of its own, and they take turns, a block of steps each. Memory is the process's
peak above that of an interpreter that has imported the libraries and loaded nothing. Needs no network.

- ours: one frozen base; adapters of the policy, of the critic and of the reward. The base is the reference.
- head: the same, but the critic is a head on the policy's states.
- lora: the policy's adapter on a base; the critic, trained whole, and the reward model on bases of their own.
- whole: policy and critic trained whole, the reference a frozen copy, the reward model on a base of its own.

    python scripts/bench_ppo.py                                             # some minutes on two cores
    python scripts/bench_ppo.py --hidden 512 1024 --layers 8 --blocks 3 --output bench.json

A step is a round here: sampling, scoring, values, reference and one update of `--epochs` each. A ratio above 1 in time
and in memory speaks for the three adapters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench_online import save_tokenizer
from bench_sides import figure_of, tell, told_of

from shared.runtime.command import run_command

WORKER = Path(__file__).with_name("bench_ppo_worker.py")
SIDES = ("ours", "head", "lora", "whole")
FACTORS = {"hidden": 512, "layers": 8, "vocab": 8000, "rows": 16, "prompt": 64, "completion": 32}
HEADER = (
    "| hidden | layers | vocab | rows | prompt | completion | by | parameters held | s a step | CPU s | time ratio "
    "| MiB | ratio |\n|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)
ROW = (
    "| {hidden} | {layers} | {vocab} | {rows} | {prompt} | {completion} | {by} | {held:.1f} M | {seconds:.2f} "
    "| {cpu_seconds:.2f} | {time_ratio:.2f} | {mib:.0f} | {memory_ratio:.2f} |"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in FACTORS.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[value])
    parser.add_argument("--epochs", type=int, default=1, help="of a round")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each; medians are reported")
    parser.add_argument("--block_steps", type=int, default=1, help="rounds of a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def prepare(setting: dict[str, Any], folder: Path, options: Any) -> None:
    """The policy, and a reward adapter on it, with weights that are drawn."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting["vocab"], hidden_size=setting["hidden"], intermediate_size=3 * setting["hidden"],
        num_hidden_layers=setting["layers"], num_attention_heads=8, max_position_embeddings=2048, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, tie_word_embeddings=True, num_labels=1,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(folder / "model")
    save_tokenizer(setting["vocab"], folder / "model")
    judge = LlamaForSequenceClassification(config)
    judge.model.load_state_dict(policy.model.state_dict())
    lora = LoraConfig(r=options.rank, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    judge = get_peft_model(judge, lora)
    judge.peft_config["default"].base_model_name_or_path = str(folder / "model")
    judge.save_pretrained(folder / "reward")
    save_tokenizer(setting["vocab"], folder / "reward")
    told = {**setting, **{name: getattr(options, name) for name in ("epochs", "rank", "threads", "block_steps")}}
    (folder / "setting.json").write_text(json.dumps(told), encoding="utf-8")


def check(first: dict[str, list[dict[str, float]]]) -> None:
    """All have scored the same samples: their first rewards are the same."""
    rewards = {by: blocks[-1]["reward"] for by, blocks in first.items()}
    assert max(rewards.values()) - min(rewards.values()) < 1e-3, f"first rewards differ: {rewards}"


def figures_of(setting: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """What each side reached."""
    pythons = dict.fromkeys(SIDES, sys.executable)
    told = told_of(setting, options, WORKER, pythons, prepare, check)
    return [{**setting, **figure_of(by, told, options), "held": told[by][0]["parameters"] / 1e6} for by in SIDES]


def main() -> None:
    options = arguments()
    settings = [dict(zip(FACTORS, v, strict=True)) for v in itertools.product(*(getattr(options, n) for n in FACTORS))]
    tell(settings, figures_of, options, header=HEADER, row=ROW, each=f", {options.epochs} epoch(s) a round")


if __name__ == "__main__":
    run_command(main)
