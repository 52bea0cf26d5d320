"""Load the built-in models: weights drawn from a seed, or shipped; processor from the model's directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import deepspeed

from shared.builtin import MODELS, model_path
from shared.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

WEIGHTS = "model.safetensors"
# Head -> the mapping of transformers from a configuration's class to the model's class.
HEADS = {
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


def load_model(name: str, seed: int = 0, head: str | None = None, **options: Any) -> PreTrainedModel:
    """Build the model `name` on the CPU in float32.

    What has no shipped weights is drawn from `seed`: the whole model or, of one with shipped weights, a new head.
    Every process gets the same weights whatever its own random state, which is left as it was.

    Args:
        name: a key of `shared.builtin.MODELS`.
        seed: for the weights that are drawn.
        head: a key of `HEADS`; None takes that of the configuration.
        options: fields of the configuration, such as `num_labels` or `attn_implementation`; with fewer
            `num_hidden_layers` than are shipped the model has the first of them, as `from_pretrained` does it.

    Raises:
        UserError: no built-in model has this name, or it has no such head.
    """
    config = load_config(name, **options)
    model_class = _model_class(name, config, head)
    with torch.random.fork_rng(devices=[]), whole_layers():
        torch.manual_seed(seed)
        model = model_class(config)
    if (model_path(name) / WEIGHTS).is_file():
        _put_weights(model, name, cut="num_hidden_layers" in options)
    return model


def load_config(name: str, **options: Any) -> PretrainedConfig:
    """The configuration of the built-in model `name`, with `options` as fields of it.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path(name), **options)


def load_processor(name: str) -> ProcessorMixin:
    """The processor of the built-in model `name`; of a language model its tokenizer, with the chat template.

    Raises:
        UserError: no built-in model has this name.
    """
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_path(name))


def _model_class(name: str, config: PretrainedConfig, head: str | None) -> type[PreTrainedModel]:
    import transformers

    if head is None:
        return getattr(transformers, config.architectures[0])
    if head not in HEADS:
        raise UserError(f"head is {head!r}, allowed: {', '.join(HEADS)}.")
    mapping = getattr(transformers, HEADS[head])
    if type(config) not in mapping:
        able = [other for other in MODELS if type(load_config(other)) in mapping]
        raise UserError(f"The built-in model {name} has no head for {head}; these have: {', '.join(able)}.")
    return mapping[type(config)]


def _put_weights(model: PreTrainedModel, name: str, *, cut: bool) -> None:
    """Put the shipped weights into the model; a head they do not have stays as it was drawn, another is left out.

    `cut`: the model may have fewer layers than the weights.
    """
    from safetensors.torch import load_file

    outcome = model.load_state_dict(load_file(model_path(name) / WEIGHTS), strict=False)
    base = f"{model.base_model_prefix}."
    left_out = [] if cut else outcome.unexpected_keys
    wrong = [key for key in (*outcome.missing_keys, *left_out) if key.startswith(base)]
    assert not wrong, f"{name}: weights do not fit: {outcome}"


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Models are made whole here: under ZeRO-3 transformers shards each layer as it is made.

    It draws other weights then; and the engine shards later what it trains, while a reward model is run without one.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
