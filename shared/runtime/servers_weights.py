"""What a server is sent of a model that is being trained: whole weights with adapters merged, or an adapter alone.

Files are what the model's own library writes, so that names and layout are those of a published checkpoint. Merging
leaves the model as it was, bit for bit. Sharded weights are not gathered here: who shards them can give the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.runtime.models import without_progress_bars

GIVE_STATE = "give update_weights(model, state_dict=accelerator.get_state_dict(model)), called on every process"


def is_adapted(model: nn.Module) -> bool:
    """Whether this is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def write_weights(
    model: nn.Module, folder: Path, *, state_dict: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write the whole model to `folder` as safetensors, with its configuration.

    Args:
        model: a transformers model, or a PEFT model around one, which is merged.
        state_dict: the whole weights of a model whose own are sharded; its names are the model's.
        dtype: of the floating-point weights in the file; None: their own.

    Returns:
        The folder.

    Raises:
        UserError: the weights are sharded and no state was given, they are quantised, or an adapter is to be merged
            into a state that was given.
    """
    if any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")):
        raise UserError("The model's weights are quantised and cannot be merged for the server: use weights='lora'.")
    if state_dict is not None and is_adapted(model):
        raise UserError(
            "The weights are sharded and have an adapter: it cannot be merged for the server; use weights='lora'."
        )
    if state_dict is None:
        _refuse_sharded(model.named_parameters())
        state_dict = merged_state(model) if is_adapted(model) else model.state_dict()
    if dtype is not None:
        state_dict = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()
        }
    base = model.get_base_model() if is_adapted(model) else model
    with without_progress_bars():  # an update a step would otherwise fill the terminal
        base.save_pretrained(folder, state_dict=dict(state_dict))
    return folder


def write_adapter(model: nn.Module, folder: Path, *, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write the active LoRA adapter to `folder` and give the folder that a server loads.

    Raises:
        UserError: the model has no adapter, the adapter is more than LoRA matrices, or its weights are sharded and no
            state was given.
    """
    if not is_adapted(model):
        raise UserError("weights='lora' sends an adapter, and the model has none: use weights='full'.")
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    more = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    if kind != "LORA" or more or getattr(config, "bias", "none") != "none":
        what = kind if kind != "LORA" else f"LoRA with {', '.join(more) or 'bias'}"
        raise UserError(f"The adapter is {what}, and a server loads plain LoRA matrices alone: use weights='full'.")
    if state_dict is None:
        _refuse_sharded((name, each) for name, each in model.named_parameters() if "lora_" in name)
    else:
        state_dict = dict(state_dict)
    # the embedding layers are the base model's: PEFT would look for its configuration to find out whether they changed
    model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[adapter], save_embedding_layers=False)
    return folder if adapter == "default" else folder / adapter


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights with the active adapters merged in, under the base model's own names.

    Each layer is merged, copied, and set back from a copy taken before: subtracting what was added would leave
    rounding errors in weights of low precision, more at every update.

    Args:
        model: a PEFT model whose weights are whole.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    merged: dict[int, Tensor] = {}
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, BaseTunerLayer):
                merged.update(_merged_layer(module))
    state: dict[str, Tensor] = {}
    wrappers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for name, value in base.state_dict(keep_vars=True).items():
        public = _public_name(name, wrappers)
        if public is not None:
            state[public] = merged.get(id(value), value.detach())
    return state


def _merged_layer(layer: Any) -> dict[int, Tensor]:
    """The parameters of an adapted layer as they are with its adapters merged, by the parameter's identity."""
    inner = layer.get_base_layer()
    before = [(each, each.detach().clone()) for each in inner.parameters()]
    layer.merge()
    # what stayed as it was is left to the model's own tensor
    merged = {
        id(each): each.detach().clone() for each, old in before if each.shape == old.shape and not each.equal(old)
    }
    layer.unmerge()
    for each, old in before:
        each.data.copy_(old)
    return merged


def _public_name(name: str, wrappers: Mapping[str, nn.Module]) -> str | None:
    """A weight's name in the base model as it was before PEFT wrapped it; None for what belongs to an adapter."""
    for prefix, module in sorted(wrappers.items(), key=lambda item: -len(item[0])):
        if name.startswith(prefix + "."):
            rest = name[len(prefix) + 1 :]
            kept = _kept_part(module)
            if not rest.startswith(kept):
                return None
            name = f"{prefix}.{rest[len(kept) :]}"
    return name


def _kept_part(module: Any) -> str:
    """Where in a module that PEFT wrapped the weights are that count now."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        return "token_adapter."
    if isinstance(module, ModulesToSaveWrapper):
        return f"modules_to_save.{module.active_adapters[0]}." if module.active_adapters else "original_module."
    return "base_layer."


def _refuse_sharded(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in parameters:
        if isinstance(parameter, DTensor) or (hasattr(parameter, "ds_shape") and parameter.numel() == 0):
            raise UserError(f"The weights are sharded over processes ({name} is not whole here): {GIVE_STATE}.")
        if "_flat_param" in name:
            raise UserError(f"The weights are sharded over processes by FSDP ({name}): {GIVE_STATE}.")
