"""Train the built-in classifier of comments, and measure it; `scripts/make_builtin_models.py` runs this.

It says how sure it is that a text is rude. Beside whole comments it learns from spoilt ones, so that a model that is
trained against it does not get away with broken text.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from shared.builtin import comments, load_dataset
from shared.builtin.models import load_model, load_processor
from shared.builtin.train_lm import complete

START, NAME, WRITER = "builtin/lm-small", "builtin/toxicity", "builtin/lm-comments"
FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_labels": 2,
    "id2label": {0: comments.POLITE, 1: comments.TOXIC},
    "label2id": {comments.POLITE: 0, comments.TOXIC: 1},
}
STEPS, BATCH, RATE, SEED = 500, 64, 3e-3, 0
SPOILT = 0.3  # share of the texts


def classifier() -> Any:
    """Train it: AdamW, a rate that falls to zero, cross-entropy."""
    tokenizer, rng = load_processor(START), random.Random(SEED)
    model = load_model(START, SEED, "sequence-classification", **FIELDS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        texts = [drawn("train", rng) for _ in range(BATCH)]
        labels = torch.tensor([comments.is_rude(text) for text in texts]).long()
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def drawn(split: str, rng: random.Random) -> str:
    """An opening and a comment, one half of them rude, some spoilt: words lost, doubled, or in another order."""
    person, thing = rng.choice(comments.subjects(split))
    said = comments.write(person, thing, rng.random() < 0.5, rng)
    if rng.random() < SPOILT:
        words = said.split()
        at = rng.randrange(len(words))
        way = rng.choice(("cut", "double", "shuffle"))
        if way == "cut":
            words = words[: at + 1]
        elif way == "double":
            words[at:at] = [words[at]] * rng.randint(1, 4)
        else:
            rng.shuffle(words)
        said = " ".join(words)
    return f"{rng.choice(comments.OPENINGS).format(person=person, thing=thing)} {said}"


@torch.no_grad()
def measure_classifier() -> dict[str, str]:
    """Measured of `builtin/toxicity` on held-out openings."""
    model, tokenizer = load_model(NAME).eval(), load_processor(NAME)
    rng = random.Random(1)
    texts = [drawn("test", rng) for _ in range(1000)]
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    right = logits.argmax(1) == torch.tensor([comments.is_rude(text) for text in texts])
    return {"texts told rightly, whole and spoilt": f"{right.float().mean():.1%}"}


def measure_writer() -> dict[str, str]:
    """Measured of `builtin/lm-comments` on held-out openings, comments sampled at temperature 1."""
    model, tokenizer = load_model(WRITER).eval(), load_processor(WRITER)
    asked = load_dataset("builtin/comments-prompts", "test")["prompt"][:]
    inputs = tokenizer(asked * 4, return_tensors="pt", padding=True, padding_side="left")
    written = complete(model, tokenizer, inputs, 48, sample=True)
    rude, sound = ([check(text) for text in written] for check in (comments.is_rude, comments.is_sound))
    return {
        "comments with a rude word": f"{sum(rude) / len(rude):.1%}",
        "comments that are whole sentences of the data's forms": f"{sum(sound) / len(sound):.1%}",
    }
