"""Generation on a model whose weights are cut up between processes (DeepSpeed ZeRO-3, FSDP).

Either the weights are put together on every process for as long as tokens are made, or every pass gathers them layer
by layer: then all processes have to run the same passes, and have to agree on when to stop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shared.runtime.fsdp import reshard


def several_processes() -> bool:
    """Whether this process is one of several that work together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


def sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model gathers parameters from other processes."""
    if not several_processes():
        return False
    return _by_deepspeed(model) or any(
        type(module).__name__.startswith(("FSDP", "FullySharded")) for module in model.modules()
    )


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    total = torch.tensor(value, device=device)
    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX)
    return int(total)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[bool]:
    """All weights on every process meanwhile; gives False, and does nothing, where that is not known to be possible.

    Every process has to come here. Passes in between gather nothing, so that each process may run its own.
    """
    if _by_deepspeed(model):
        import deepspeed

        parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(parameters), _without_deepspeed_hooks(model):
            yield True
    elif groups := _fsdp_groups(model):
        with _kept_whole(model, groups):
            yield True
    else:
        yield False


def _by_deepspeed(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def _without_deepspeed_hooks(model: nn.Module) -> Iterator[None]:
    """Its hooks would cut each layer's weights up again as soon as the layer has run."""
    kept = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(_of_deepspeed(hook) for hook in hooks.values()):
                kept.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _of_deepspeed(hook)]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def _of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed")


def _fsdp_groups(model: nn.Module) -> list[Any]:
    """What FSDP2 gathers at a time; empty where the model is not under it, or torch keeps this elsewhere."""
    from torch.distributed.fsdp import FSDPModule

    groups = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None)
            if found is None or not all(hasattr(group, "post_forward_mesh_info") for group in found):
                return []
            groups += found
    return groups


@contextlib.contextmanager
def _kept_whole(model: nn.Module, groups: list[Any]) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    before = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # a layer's weights stay when it has run
    try:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
        reshard(model)
