"""Load the built-in models: weights drawn from a seed, processor from the model's directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shared.builtin import model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def load_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build the model `name` on the CPU in float32 with weights drawn from `seed`.

    Every process gets the same weights whatever its own random state, which is left as it was.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = model_path(name)
    config = AutoConfig.from_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def load_processor(name: str) -> ProcessorMixin:
    """The processor (tokenizer, chat template, image processor) of the built-in model `name`.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_path(name))
