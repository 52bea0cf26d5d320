"""A second, frozen adapter beside the one that is trained: the reference of a run that goes on with an adapter.

It stands in the PEFT model under the name "reference", is not trained, and is not saved with the model. Which adapter
runs is switched on the layers themselves: PEFT's own switches set and unset what is trained, under an engine's feet.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.trainers.keeping import preserved_randomness

REFERENCE_ADAPTER = "reference"
NAMED = 4  # weights that a message names


def trained_adapter(model: Any) -> str:
    """The name of the adapter that is trained.

    Raises:
        UserError: several are active, or the active one is called "reference".
    """
    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1 or names[0] == REFERENCE_ADAPTER:
        raise UserError(
            f"The active adapters of the model are {', '.join(names) or 'none'}: set one other than "
            f"{REFERENCE_ADAPTER!r} active with model.set_adapter(name); it is the one that is trained."
        )
    return names[0]


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter's parameters and buffers, by their names with a star for the adapter's."""
    found = {}
    for path, container in model.named_modules():  # PEFT keeps what is an adapter's in dicts with its name as key
        if not hasattr(type(container), "keys") or adapter not in container:
            continue
        item = container[adapter]
        if isinstance(item, Tensor):
            found[f"{path}.*"] = item
        elif isinstance(item, nn.Module):
            tensors = (*item.named_parameters(), *item.named_buffers())
            found.update({f"{path}.*.{name}": tensor for name, tensor in tensors})
    return found


def trained_outside(model: Any, part: nn.Module | None = None) -> list[str]:
    """The names of the weights that are trained beside a PEFT model's adapters; in a part of it, where given."""
    inside = {id(tensor) for name in model.peft_config for tensor in adapter_tensors(model, name).values()}
    named = (part or model).named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in inside]


def check_can_be_switched(model: Any, *, trains_nothing_else: bool = True) -> None:
    """See that a model with its adapter off stays what it is, whatever is trained.

    Args:
        model: a PEFT model.
        trains_nothing_else: whether weights outside of its adapters must be frozen.

    Raises:
        UserError: the adapter is not in layers that can be switched, or weights beside it are trained; named.
    """
    adapter = trained_adapter(model)
    if getattr(model.peft_config[adapter], "is_prompt_learning", False):
        raise UserError(
            f"The adapter {adapter!r} ({type(model.peft_config[adapter]).__name__}) learns a prompt, which cannot be "
            "switched off: the model cannot be its own reference. Give a reference model (the base model's name will "
            "do), or train a LoRA adapter."
        )
    if not trains_nothing_else:
        return
    if outside := trained_outside(model):
        more = f" and {len(outside) - NAMED} more" if len(outside) > NAMED else ""
        raise UserError(
            f"The model trains weights outside of its adapter: {', '.join(outside[:NAMED])}{more}. They stay changed "
            "with the adapter off, so that the model cannot be its own reference. Train the adapter alone (LoRA: "
            "bias='none'; a layer in full by modules_to_save), or give a reference model (the base model's name will "
            "do)."
        )


@torch.no_grad()
def adds_nothing(model: Any) -> bool:
    """Whether the model with its adapter is still the model without: a LoRA adapter that was not trained yet."""
    from peft import LoraConfig

    adapter = trained_adapter(model)
    if not isinstance(model.peft_config[adapter], LoraConfig):
        return False
    tensors = adapter_tensors(model, adapter)
    originals = {**dict(model.named_parameters()), **tensors}
    for name, tensor in tensors.items():
        before = name.replace("modules_to_save.*", "original_module").replace("_tokens_delta", "_tokens_original")
        original = originals.get(before, tensor)
        with gathered(tensor), gathered(original):
            starts_at_zero = "lora_B" in name or "lora_embedding_A" in name
            if (starts_at_zero and tensor.any()) or not torch.equal(tensor, original):
                return False
    return True


def add_reference_adapter(model: Any, name: str = REFERENCE_ADAPTER) -> None:
    """Copy the trained adapter, as it is now, into a frozen one of another name."""
    adapter = trained_adapter(model)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others take the base's weights apart a second time
    add_frozen_adapter(model, name, config)
    with torch.no_grad():
        source = adapter_tensors(model, adapter)
        for place, tensor in adapter_tensors(model, name).items():
            tensor.data = source[place].detach().clone()


def add_frozen_adapter(model: Any, name: str, config: Any) -> None:
    """Put an adapter beside the one that is trained and stays in use: frozen, left out where the model is saved.

    Args:
        model: a PEFT model.
        name: of the new adapter.
        config: its PEFT configuration.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with preserved_randomness():
        model.add_adapter(name, config)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    keep_out_of_training(model, name)


def keep_out_of_training(model: Any, name: str = REFERENCE_ADAPTER) -> None:
    """Freeze the adapter of that name, and leave it out where the model is saved."""
    for tensor in adapter_tensors(model, name).values():
        tensor.requires_grad_(False)
    model.save_pretrained = types.MethodType(_without(name, model.save_pretrained.__func__), model)


def _without(name: str, plain):
    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: str, *args: Any, selected_adapters=None, **kwargs: Any):
        selected = [each for each in selected_adapters or self.peft_config if each != name]
        return plain(self, save_directory, *args, selected_adapters=selected, **kwargs)

    return save_pretrained


@contextlib.contextmanager
def adapter_in_use(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run with another adapter, or with none, for a while; what is trained stays as it is.

    Args:
        model: a PEFT model, unwrapped; any other model is left alone.
        adapter: the adapter's name; None for the base model.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


@contextlib.contextmanager
def gathered(tensor: Tensor, *, write: bool = False) -> Iterator[None]:
    """A parameter that DeepSpeed ZeRO-3 cuts up, whole for a while; with `write`, changes are kept."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if write else None):
        yield
