"""Prompts with images, trainers on the tiny vision-language models, and what an independent forward says of them."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from PIL import Image
from tiny import FAMILIES
from tiny_online import even

from visionalign import VLMGRPOConfig, VLMGRPOTrainer
from visionalign.families import modules

TEXT_ONLY = tuple(family for family in FAMILIES if family not in ("paligemma", "mllama"))  # may lack images
SEVERAL = tuple(family for family in FAMILIES if family != "paligemma")  # take several images


def picture(seed, width=32, height=40):
    """Noise, so that no two are alike."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pictures(at, family):
    """What row `at` shows: one image, several or, where the family allows it, none; of unlike size."""
    if at % 4 == 3 and family in TEXT_ONLY:
        return []
    several = at % 2 and family in SEVERAL
    return [picture(10 * at + i, 32 + 8 * (at % 3), 40 - 6 * ((at + i) % 3)) for i in range(2 if several else 1)]


def asks(family, count=6):
    """Prompts of unlike length with images of unlike size: one, several and, where the family allows it, none."""
    rows = []
    for at in range(count):
        images = pictures(at, family)
        text = f"What colour is {'the ' * (at % 3)}circle?"
        prompt = text if family == "paligemma" or at % 3 == 0 else [{"role": "user", "content": text}]
        rows.append({"prompt": prompt, "images": images, "number": at})
    return rows


def make(path, folder, family="llava", reward=even, rows=None, **options):
    """A trainer of small rounds: 2 prompts of 4 completions a step."""
    rest = {key: options.pop(key) for key in ("model", "ref_model", "peft_config", "eval_dataset") if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 2,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    rows = asks(family) if rows is None else rows
    model = rest.pop("model", str(path))
    return VLMGRPOTrainer(model, reward, VLMGRPOConfig(**config), train_dataset=rows, **rest)


def loud(model):
    """Weights that are larger than a fresh model's, so that what a token sees shows in the figures."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:  # of cross-attention, closed at first
                parameter.fill_(0.7)
            elif not parameter.any() and parameter.dim() >= 2:  # Gemma 3's projector
                parameter.normal_(std=0.1, generator=generator)
            elif parameter.dim() >= 2:
                parameter.mul_(2.5)
    return model


def sampled(trainer, rows, group_size=4, mode="train"):
    """A rollout over some rows, with the model in training mode again afterwards."""
    trainer.model.eval()
    rollout = trainer.actor.act(trainer.model, rows, group_size, random=torch.Generator().manual_seed(0), mode=mode)
    trainer.model.train()
    return rollout


def plain_log_probs(trainer, row, ids):
    """`(n,)` of a completion by the model's own forward over prompt and completion as one row, of no padding."""
    collator, model = trainer.actor.encoder.collator, trainer.model
    inputs, _ = collator.encode_prompts([row])
    shape = inputs.pop("input_ids").shape, inputs["attention_mask"].shape
    assert shape[0] == shape[1] and bool(inputs["attention_mask"].all())
    prompt = collator.encode_prompts([row])[0]["input_ids"]
    grown = {}
    for name, value in inputs.items():
        if value.shape[:2] == prompt.shape:
            last = value[:, -1:]
            if name == "token_type_ids" and collator.family.prefix_suffix:
                last = torch.ones_like(last)
            value = torch.cat([value, last.expand(-1, len(ids), *value.shape[2:])], 1)
        grown[name] = value
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, ids[None]], 1), use_cache=False, **grown).logits[0]
    model.train(was)
    predicting = logits[prompt.shape[1] - 1 : -1].float() / trainer.policy.transform.temperature
    return predicting.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@contextlib.contextmanager
def seen_by(model):
    """How many numbers of pixels go into the vision tower meanwhile, call by call."""
    counts = []
    tower = modules(model, "vision_tower")[0]

    def count(module, args, kwargs):
        values = [*args, *kwargs.values()]
        counts.append(next(value.numel() for value in values if torch.is_tensor(value)))

    hook = tower.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()
