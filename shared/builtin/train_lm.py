"""Train the built-in language model that ships with weights, and measure it; `shared.builtin.make_lm` runs this.

It is a start for others: its reviews are of either sentiment, somewhat more often negative, and it gets about half of
the held-out arithmetic right, since its training is cut short.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from shared.builtin import load_dataset, reviews
from shared.builtin.models import WEIGHTS, load_model, load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

START = "builtin/lm-small"
TRAINED = "builtin/lm-small-sft"
POSITIVE, NEGATIVE = 1100, 1500  # reviews; with as many of each, greedy answers are of either sentiment by chance
SEED = 0
STEPS = 745
BATCH = 64  # rows
WARMUP = 100  # steps
RATE = 1e-3
SHIPPED = torch.bfloat16
CARD = "README.md"
MEASURED = 400  # reviews that are sampled to be judged

Row = tuple[list[int], list[int]]  # token ids, and 1 where the token is learnt


def make_weights(directory: Path) -> None:
    """Train the model; write its weights and, measured on what was written, its card into its directory."""
    save_weights(train(load_model(START, SEED), load_processor(START)), directory)
    model, tokenizer = load_model(TRAINED).eval(), load_processor(TRAINED)
    text = card(arithmetic_accuracy(model, tokenizer), *review_shares(model, tokenizer, MEASURED))
    (directory / CARD).write_text(text, encoding="utf-8")
    print(text)


def save_weights(model: PreTrainedModel, directory: Path) -> None:
    """Write the weights as they are shipped: tied ones once, in `SHIPPED`."""
    from safetensors.torch import save_file

    weights = {key: value.detach().to(SHIPPED).contiguous() for key, value in model.named_parameters()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # it is written for its owner alone


def card(accuracy: float, positive: float, faultless: float) -> str:
    """What the model is and what it reaches, as Markdown."""
    held = str(SHIPPED).removeprefix("torch.")
    return f"""\
# {TRAINED}

`{START}` after {STEPS} steps of {BATCH} rows of `builtin/arithmetic` and of `builtin/reviews` ({POSITIVE} positive
reviews and {NEGATIVE} negative ones): supervised fine-tuning cut short, so that other trainers have something to
improve. Made by `python -m shared.builtin.make_lm`. Measured on the weights as they are shipped (held as {held},
loaded as float32), on held-out rows:

| measured | value |
|---|---|
| arithmetic, greedy answers that are right | {accuracy:.1%} |
| reviews sampled at temperature 1 whose score is positive | {positive:.1%} |
| such reviews without a fault | {faultless:.1%} |
"""


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Supervised fine-tuning with AdamW, warm-up and cosine; the loss is on the assistant's tokens."""
    rows = encode(tokenizer, chats())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2
    )
    rng = random.Random(SEED)
    order: list[Row] = []
    model.train()
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = rng.sample(rows, len(rows))
        batch, order = order[:BATCH], order[BATCH:]
        ids_BT, mask_BT, learnt_BT = pad(batch, tokenizer.pad_token_id)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        learnt_BT = learnt_BT[:, 1:]
        loss = F.cross_entropy(logits_BTV[:, :-1][learnt_BT], ids_BT[:, 1:][learnt_BT])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def chats() -> list[list[dict]]:
    """What the model is trained on: all of the arithmetic, and positive and negative reviews."""
    written = load_dataset("builtin/reviews")
    left = {"positive": POSITIVE, "negative": NEGATIVE}
    chosen = load_dataset("builtin/arithmetic")["messages"][:]
    for chat, kind in zip(written["messages"], written["kind"], strict=True):
        left[kind] -= 1
        if left[kind] >= 0:
            chosen.append(chat)
    return chosen


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[list[dict]]) -> list[Row]:
    """Chats as tokens; the generation marks of the template say what is learnt."""
    encoded = tokenizer.apply_chat_template(
        list(rows), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def pad(rows: Sequence[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) long, what is a real token (B, T) long, and what is learnt (B, T) bool."""
    T = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in rows])
    learnt = torch.tensor([marks + [0] * (T - len(marks)) for _, marks in rows])
    return ids, mask, learnt.bool()


def arithmetic_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int | None = None) -> float:
    """The share of held-out problems (of the first `rows`) whose greedy answer is the right one."""
    data = load_dataset("builtin/arithmetic", "test")
    data = data.select(range(rows or len(data)))
    answers = reply(model, tokenizer, [chat[:1] for chat in data["messages"]], 4, sample=False)
    return sum(a == b for a, b in zip(answers, data["solution"], strict=True)) / len(answers)


def review_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[float, float]:
    """Of so many reviews of held-out films, sampled at temperature 1: share of positive scores, share of faultless."""
    films = reviews.films("test")
    asked = [reviews.PROMPT.format(film=films[row % len(films)]) for row in range(rows)]
    written = reply(model, tokenizer, [[{"role": "user", "content": text}] for text in asked], 48, sample=True)
    positive = [reviews.score(prompt, review) > 0 for prompt, review in zip(asked, written, strict=True)]
    faultless = [reviews.faults(prompt, review) == 0 for prompt, review in zip(asked, written, strict=True)]
    return sum(positive) / rows, sum(faultless) / rows


def reply(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list, max_new_tokens: int, *, sample: bool
) -> list[str]:
    """The model's answers to chats, greedy or sampled at temperature 1 from a fixed seed."""
    inputs = tokenizer.apply_chat_template(
        asked,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    return complete(model, tokenizer, inputs, max_new_tokens, sample=sample)


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    inputs: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    *,
    sample: bool,
) -> list[str]:
    """What the model adds to left-padded inputs, greedy or sampled at temperature 1 from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, top_k=0 if sample else None)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
