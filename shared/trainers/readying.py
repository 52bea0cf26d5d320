"""The model of a trainer, ready to be run outside of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled

from shared.runtime.fsdp import reshard

if TYPE_CHECKING:
    from shared.trainers.base import AlignTrainer


@contextlib.contextmanager
def evaluated_model(trainer: AlignTrainer) -> Iterator[nn.Module]:
    """The model as the engine wraps it; wrapped for this evaluation alone where there was no training before."""
    accelerator = trainer.accelerator
    prepared = accelerator._models or trainer.model_wrapped is not trainer.model
    if trainer.is_fsdp_enabled:
        if not prepared:  # in place and for good; accelerate shards only together with an optimizer
            idle = torch.optim.SGD(trainer.model.parameters())
            trainer.model = trainer.model_wrapped = accelerator.prepare(trainer.model, idle)[0]
        yield trainer.model_wrapped
        reshard(trainer.model)
    elif prepared or trainer.is_in_train:
        yield trainer.model_wrapped
    elif is_deepspeed_zero3_enabled():
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        engine = accelerator.prepare(trainer.model)
        yield engine
        engine.destroy()
        accelerator.free_memory()
    else:  # accelerate's own preparation would mark the model: training would not average its gradients then
        if trainer.is_deepspeed_enabled:
            trainer.model.to(trainer.args.device)
        with accelerator.autocast():
            yield trainer.model
