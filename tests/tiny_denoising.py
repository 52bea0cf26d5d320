"""Trainers of denoising steps on tiny pipelines: small rounds, their steps and figures."""

from __future__ import annotations

import torch
from tiny_pipelines import tiny_pipeline

import diffusionalign

PROMPTS = [{"prompt": text, "number": at} for at, text in enumerate(("a red circle", "blue", "a green square", "x"))]


def bright(images, **_):
    """Mean of all pixels."""
    return images.mean((1, 2, 3))


def make(name, folder, reward=bright, pipeline="sd", rows=PROMPTS, **options):
    """A trainer of 2 prompts of 4 pictures a round, each of 4 steps, by full float32 numbers."""
    rest = {key: options.pop(key) for key in ("peft_config", "ref_model", "eval_dataset") if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_steps": 2,
        "eval_answers": 0,
        "sample_every": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **options,
    }
    pipeline = tiny_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    torch.manual_seed(0)  # of an adapter's weights
    trainer = getattr(diffusionalign, f"{name}Trainer")
    return trainer(pipeline, reward, getattr(diffusionalign, f"{name}Config")(**config), rows, **rest)


def perturb(model, size=0.05):
    """Move what is trained, so that both halves of a new adapter have a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def step(trainer, stream=None):
    """Loss and gradients of the next optimizer step, and its micro-batches; the weights stay."""
    model = trainer.model_wrapped = trainer.model
    model.zero_grad()
    stream = iter(trainer.get_train_dataloader()) if stream is None else stream
    batches, count = trainer.get_batch_samples(stream, trainer.args.gradient_accumulation_steps, "cpu")
    loss = sum(trainer.training_step(model, batch, count).item() for batch in batches)
    trainer.state.global_step += 1
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, batches


def same(one, other, tolerance=1e-4):
    """Gradients are the same, and not all zero."""
    assert one.keys() == other.keys()
    assert sum(value.abs().sum() for value in one.values()) > 1e-4
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=1e-7, msg=name)


def history(trainer, name):
    """What was logged under a name, log by log."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
