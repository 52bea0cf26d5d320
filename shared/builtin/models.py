"""Load the built-in models: weights drawn from a seed, processor from the model's directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers.integrations import deepspeed

from shared.builtin import model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def load_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build the model `name` on the CPU in float32 with weights drawn from `seed`.

    Every process gets the same weights whatever its own random state, which is left as it was.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    path = model_path(name)
    config = AutoConfig.from_pretrained(path)
    with torch.random.fork_rng(devices=[]), _whole_layers():
        torch.manual_seed(seed)
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)


@contextlib.contextmanager
def _whole_layers() -> Iterator[None]:
    """Under ZeRO-3 transformers shards each layer as it is made, and draws other weights then.

    The engine shards the whole model later.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def load_processor(name: str) -> ProcessorMixin:
    """The processor (tokenizer, chat template, image processor) of the built-in model `name`.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_path(name))
