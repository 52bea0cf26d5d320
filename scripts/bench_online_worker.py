"""One of those that bench_online.py measures, in a process of its own: the trainer here, trl's, or the bare floor.

It is started by bench_online.py, in the interpreter that has what it needs, and imports nothing of this project but
for the trainer here. A line on standard input lets it make a block of steps; a line of JSON on standard output tells
how long they took. The completions of its very first step are given, so that all train on the same ones.

    python scripts/bench_online_worker.py floor FOLDER
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_turns import Turns, answering
from torch import Tensor, nn

LR = 1e-6


def parity(completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
    """A reward that is about a half and cheap: the share of odd tokens."""
    return [sum(int(token) % 2 for token in ids) / len(ids) for ids in completion_ids]


def counting(turns: Turns, generate: Callable) -> Callable:
    """`generate`, which gives completions as lists of tokens first, with its time and its tokens counted."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        turns.counted["tokens"] += sum(map(len, made[0] if isinstance(made, tuple) else made.ids))
        return made

    return turns.timed("generation", wrapped)


# ---- Those that train -----------------------------------------------------------------------------------------------


def options_of(setting: dict[str, Any], folder: Path, by: str) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": str(folder / by), "learning_rate": LR, "lr_scheduler_type": "constant", "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "report_to": [], "seed": 0, "max_steps": 1_000_000,
        "per_device_train_batch_size": setting["rows"], "num_generations": setting["group"],
        "max_completion_length": setting["completion"], "shuffle_dataset": False, "loss_type": "dapo", "beta": 0.0,
        "temperature": 1.0, "logging_first_step": True, "logging_steps": 10, "max_grad_norm": 1.0,
    }  # fmt: skip


def first_given(generate: Callable, given: Any) -> Callable:
    """`generate`, but what is given at the first call."""
    left = [given]
    return lambda *args, **kwargs: left.pop() if left else generate(*args, **kwargs)


def train_here(model: Any, tokenizer: Any, rows: list[dict], setting: dict, folder: Path, turns: Turns) -> None:
    from datasets import Dataset

    from shared.runtime.generation import Completions
    from textalign.policy_gradient import GRPOConfig, GRPOTrainer

    os.environ["TRIALIGN_CACHE"] = str(folder / "cache")
    args = GRPOConfig(**options_of(setting, folder, "ours"), eval_answers=0, sample_every=0)
    trainer = GRPOTrainer(model, parity, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    torch.set_num_threads(setting["threads"])
    engine, given = trainer.actor.engine, [torch.tensor(ids) for ids in setting["given"]]
    ended = [ids[-1] == tokenizer.eos_token_id for ids in setting["given"]]
    engine.generate = counting(turns, first_given(engine.generate, Completions(given, None, ended)))
    turns.watch(trainer)
    turns.begin()
    trainer.train()


def train_by_trl(model: Any, tokenizer: Any, rows: list[dict], setting: dict, folder: Path, turns: Turns) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    more = {"gradient_checkpointing": False, "use_cpu": model.device.type == "cpu"}
    args = GRPOConfig(**options_of(setting, folder, "trl"), **more)
    trainer = GRPOTrainer(model, parity, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    torch.set_num_threads(setting["threads"])
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = counting(turns, first_given(generate, (setting["given"], None)))
    turns.watch(trainer)
    turns.begin()
    trainer.train()


def train_bare(model: Any, tokenizer: Any, rows: list[dict], setting: dict, folder: Path, turns: Turns) -> None:
    """What a step cannot do without, as a tutorial writes it: `generate` of all rows, then an update on whole rows.

    Logits are those of the completions alone.
    """
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, padding_side="left", return_tensors="pt")
    torch.set_num_threads(setting["threads"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    first: dict[str, float] = {}
    turns.history = lambda: first
    generate = counting(turns, first_given(bare_completions, (setting["given"],)))
    turns.begin()
    for ids, mask in itertools.cycle(drawn(prompts, setting, model.device)):
        model.eval()
        (written,) = generate(model, ids, mask, setting["completion"], tokenizer)
        model.train()
        loss = bare_loss(model, ids, mask, written, setting["group"], tokenizer.pad_token_id)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first.setdefault("loss", loss.item())
        first.setdefault("grad_norm", norm.item())
        turns.step()


def drawn(prompts: Any, setting: dict[str, Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts of one step after the other, each as often as it is completed."""
    count = setting["rows"] // setting["group"]
    for at in range(0, len(prompts["input_ids"]), count):
        ids, mask = (prompts[name][at : at + count].to(device) for name in ("input_ids", "attention_mask"))
        yield ids.repeat_interleave(setting["group"], 0), mask.repeat_interleave(setting["group"], 0)


@torch.no_grad()
def bare_completions(model: Any, ids: Tensor, mask: Tensor, longest: int, tokenizer: Any) -> tuple[list[list[int]]]:
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, top_k=0, temperature=1.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    end = tokenizer.eos_token_id
    return ([row[: row.index(end) + 1] if end in row else row for row in made],)


def bare_loss(model: Any, ids: Tensor, mask: Tensor, written: list[list[int]], group: int, pad: int) -> Tensor:
    """DAPO's loss on the policy that sampled."""
    rewards = torch.tensor(parity([], written)).view(-1, group)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    width = max(map(len, written))
    completions = torch.tensor([row + [pad] * (width - len(row)) for row in written], device=ids.device)
    counted = torch.tensor([[at < len(row) for at in range(width)] for row in written], device=ids.device)
    logits = model(
        input_ids=torch.cat([ids, completions], 1),
        attention_mask=torch.cat([mask, counted.to(mask.dtype)], 1),
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, completions[..., None]).squeeze(2)
    ratio = (logp - logp.detach()).exp()
    return -(ratio * advantages.to(ids.device)[:, None] * counted).sum() / counted.sum()


TRAIN = {"ours": train_here, "trl": train_by_trl, "floor": train_bare}


def main() -> None:
    by, folder = sys.argv[1], Path(sys.argv[2])
    said = answering()
    setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    torch.set_num_threads(setting["threads"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [{"prompt": prompt} for prompt in setting["prompts"]]
    TRAIN[by](model, tokenizer, rows, setting, folder, Turns(said, setting["block_steps"], device))


if __name__ == "__main__":
    main()
