"""The denoiser made ready for training: what is frozen, in which type, with which adapter, recomputed or not.

The adapter is put into the pipeline's own denoiser, so that the pipeline shows at any time what has been learnt. How a
trained denoiser is written and read back is in `saving`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from diffusionalign.pipelines.base import PipelineAdapter
from diffusionalign.pipelines.loading import LORA_FILE, asked_type, frozen_type
from shared.errors import UserError
from shared.hub import require_available
from shared.runtime.adapters import attach_adapter
from shared.runtime.models import without_dropout

LORA = "lora"  # peft_config: the adapter that is put on where nothing else is said
RANK, ALPHA = 16, 32
# ways to draw an adapter that leave the base weights as they are: plain diffusers would add it to others
DRAWN = (True, False, "gaussian", "orthogonal")


def prepare_denoiser(adapter: PipelineAdapter, peft_config: Any, args: Any) -> nn.Module:
    """Freeze the pipeline's parts, put them on the device, and give what is trained.

    Args:
        adapter: of the pipeline.
        peft_config: "lora", an adapter of rank 16 on the attention; a peft.LoraConfig (without targets: the
            attention); folder or hub id of a LoRA to go on with, of this suite or any that diffusers loads; None: the
            whole denoiser is trained.
        args: the trainer's; its device, seed, number types and `activation_checkpointing` are read.

    Returns:
        The denoiser, or the PEFT model around it; what is trained is in float32, and there is no dropout.

    Raises:
        UserError: an adapter that cannot be put on, or that plain diffusers could not load.
    """
    pipeline, denoiser = adapter.pipeline, adapter.denoiser
    if getattr(denoiser, "peft_config", None):
        raise UserError(
            "The pipeline has an adapter already: take it off (pipeline.unload_lora_weights()) and give its folder as "
            "peft_config to go on with it, or make it part of the weights first (pipeline.fuse_lora())."
        )
    frozen, asked = frozen_type(args), asked_type(args) is not None
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False).to(args.device)
            # parts that were loaded in half precision stay in it
            held = asked or part.dtype == torch.float32
            _cast(part, torch.float32 if part is denoiser and peft_config is None else frozen if held else part.dtype)
    set_seed(args.seed)  # an adapter that is drawn here is alike in all processes
    if peft_config is None:
        model = denoiser.requires_grad_(True)
    else:
        named = isinstance(peft_config, str | Path) and str(peft_config) != LORA
        model = _continued(adapter, str(peft_config)) if named else _adapted(adapter, peft_config)
    without_dropout(model)
    _show_config(denoiser)
    denoiser.eval()  # the adapter's layers too
    denoiser.train = types.MethodType(_train, denoiser)
    denoiser.activation_checkpointing_enable = functools.partial(_recompute, denoiser)  # the name Trainer calls
    if args.activation_checkpointing:
        _recompute(denoiser, args.activation_checkpointing_kwargs)
        _recompute(adapter.vae, args.activation_checkpointing_kwargs)
    return model


def _adapted(adapter: PipelineAdapter, config: Any) -> nn.Module:
    """A new adapter on the denoiser."""
    from peft import LoraConfig

    if config == LORA:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA)
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"peft_config is a {type(config).__name__}: give {LORA!r}, a peft.LoraConfig, the folder or hub id of a "
            "LoRA to go on with, or None to train the whole denoiser. Diffusers loads no other kind."
        )
    for name, fits in (
        ("modules_to_save", not config.modules_to_save),
        ("bias", config.bias == "none"),
        ("init_lora_weights", config.init_lora_weights in DRAWN),
    ):
        if not fits:
            raise UserError(
                f"peft_config: {name}={getattr(config, name)!r}: diffusers could not load such a LoRA. Leave it out."
            )
    config = copy.copy(config)
    config.task_type = None  # these are tasks of language models
    config.target_modules = config.target_modules or set(adapter.lora_targets)
    return attach_adapter(adapter.denoiser, config)


def _continued(adapter: PipelineAdapter, path: str) -> nn.Module:
    """A saved adapter, read by diffusers whatever wrote it, and put on in the place that a new one has."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    pipeline, denoiser = adapter.pipeline, adapter.denoiser
    require_available(path, file=LORA_FILE, what="adapter")
    try:
        with _quiet():
            pipeline.load_lora_weights(path, adapter_name="default", use_safetensors=True)
            read = pipeline.lora_state_dict(path, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"adapter {path!r} cannot be put on this {type(pipeline).__name__}: {first}") from error
    parts = pipeline.components.items()
    others = [name for name, part in parts if part is not denoiser and getattr(part, "peft_config", None)]
    config = getattr(denoiser, "peft_config", {}).get("default")
    if config is None or others:
        beside = f"changes {', '.join(others)}, which are not trained here" if others else "has no weights for it"
        raise UserError(f"adapter {path!r} cannot be gone on with: it {beside}.")
    state = get_peft_model_state_dict(denoiser, adapter_name="default")
    pipeline.unload_lora_weights()
    # put on, it took the type of the denoiser; a file with the denoiser's own names holds it as it was
    exact = read[0] if isinstance(read, tuple) else read
    state = {name: exact.get(f"{adapter.denoiser_name}.{name}", value) for name, value in state.items()}
    model = _adapted(adapter, config)
    set_peft_model_state_dict(model, {f"base_model.model.{name}": value for name, value in state.items()})
    return model


def _cast(part: Any, dtype: torch.dtype) -> None:
    """As loading in this type does: some layers of T5 overflow in float16 and stay in float32."""
    if part.dtype == dtype:
        return
    with _quiet():
        part.to(dtype)
    kept = getattr(part, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    for name, module in part.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings of what is meant to be so."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _recompute(
    model: Any,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Compute activations again in the backward pass, by diffusers' own switch."""
    if every_n_layers != 1 or offload:
        raise UserError("activation_checkpointing_kwargs: diffusers takes neither every_n_layers nor offload.")
    options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    if options["use_reentrant"]:
        raise UserError("activation_checkpointing_kwargs: use_reentrant would cut the gradient off a frozen denoiser.")

    def again(module: nn.Module, *inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, **options)

    model.enable_gradient_checkpointing(again)


def _train(denoiser: nn.Module, mode: bool = True) -> nn.Module:
    """Note the mode, and leave the blocks as they sample.

    Those of a UNet lay out memory otherwise in training, from which half precision rounds otherwise.
    """
    denoiser.training = mode
    return denoiser


def _show_config(denoiser: Any) -> None:
    """Let trackers write the denoiser's configuration as they write that of transformers' models."""
    from diffusers.configuration_utils import FrozenDict

    class Shown(FrozenDict):
        def to_json_string(self) -> str:
            return json.dumps(self, indent=2, sort_keys=True, default=str)

    denoiser._internal_dict = Shown(denoiser._internal_dict)
