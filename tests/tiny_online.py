"""Online trainers on the tiny text model: rows, rewards that it can learn, and completions that are recorded."""

from __future__ import annotations

import pytest
import torch

import textalign
from shared.runtime.generation import Completions

SHAPES = ("circle", "square", "triangle")


def questions(count=8, *, chat=False):
    """Prompts of unlike length with a column `number`, which rewards may take."""
    rows = []
    for i in range(count):
        text = f"What colour is {'the ' * (i % 4)}{SHAPES[i % 3]} {i}?"
        rows.append({"prompt": [{"role": "user", "content": text}] if chat else text, "number": i})
    return rows


def even(completion_ids, **_):
    """The share of even tokens: half of them at first, and easy to raise."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(name, model_path, folder, reward=even, rows=None, **options):
    """A trainer of small rounds: 2 prompts of 4 completions a step."""
    rest = {key: options.pop(key) for key in ("model", "ref_model", "peft_config", "eval_dataset") if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    trainer = config.pop("trainer", None) or getattr(textalign, f"{name}Trainer")
    return trainer(
        rest.pop("model", model_path),
        reward,
        getattr(textalign, f"{name}Config")(**config),
        train_dataset=questions() if rows is None else rows,
        **rest,
    )


def history(trainer, name):
    """What was logged under a name, log by log."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recorded:
    """An engine that gives each prompt its own fixed completions, of unlike lengths; the longest ones are cut.

    Args:
        longest: tokens of the longest.
        exact: said of itself.
        logp: `(prompt ids, completion ids) -> (n,)` of the sampler; None: it does not tell.
    """

    def __init__(self, longest=6, *, exact=True, logp=None):
        self.longest, self.exact, self.logp = longest, exact, logp

    def generate(self, model, inputs, group_size, sampling, *, random=None):
        done = Completions([], [] if self.logp else None, [])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            prompt = ids[mask.bool()]
            own = torch.Generator().manual_seed(int(prompt.sum()))
            for _ in range(group_size):
                count = int(torch.randint(1, self.longest + 1, (), generator=own))
                done.ids.append(torch.randint(5, 256, (count,), generator=own))
                done.finished.append(count < self.longest)
                if self.logp:
                    done.logp.append(self.logp(prompt, done.ids[-1]))
        return done

    def update_weights(self, model, state_dict=None):
        """It has no weights."""


def perturb(model, seed=1):
    """Move all weights that are trained, alike for equal models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def steps(trainer, count, *, rate=0.5):
    """Loss and gradients of the first optimizer steps, each followed by plain descent on all weights."""
    model = trainer.model
    trainer.model_wrapped = model
    stream = iter(trainer.get_train_dataloader())
    found = []
    for _ in range(count):
        model.zero_grad()
        model.train()
        batches, items = trainer.get_batch_samples(stream, trainer.args.gradient_accumulation_steps, "cpu")
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=items)
            loss.backward()
            total += loss.item()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((total, gradients))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter -= rate * gradients[name]
        trainer.state.global_step += 1
    return found


def same(one, other, tolerance=1e-5):
    """Steps have the same losses and gradients, and gradients that are not all zero."""
    for (loss, gradients), (other_loss, others) in zip(one, other, strict=True):
        assert loss == pytest.approx(other_loss, rel=tolerance, abs=tolerance)
        assert gradients.keys() == others.keys()
        assert sum(value.abs().sum() for value in gradients.values()) > 1e-3
        for name, value in gradients.items():
            torch.testing.assert_close(value, others[name], rtol=1e-4, atol=tolerance, msg=name)
