"""A few of a run's tensors in a file of their own, beside a model or in a checkpoint, whatever the engine.

All processes call these together, since an engine may have cut the tensors up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.errors import UserError
from shared.trainers.reference_adapter import gathered


@torch.no_grad()
def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, writes: bool, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors.

    Args:
        tensors: by the names that they get there.
        path: the file.
        writes: whether this process writes.
        metadata: what else is said in the file.
    """
    held = {}
    for name, tensor in tensors.items():
        with gathered(tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if writes:
                held[name] = whole.detach().to("cpu", copy=True).contiguous()
    if writes:
        save_file(held, path, metadata=None if metadata is None else dict(metadata))


@torch.no_grad()
def read_tensors(targets: Mapping[str, Tensor], path: Path, *, otherwise: str) -> None:
    """Put what a file holds into tensors, in place.

    Args:
        targets: by their names in the file.
        path: the file.
        otherwise: what is said where it holds other tensors.

    Raises:
        UserError: it holds others.
    """
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(getattr(target, "ds_shape", target.shape)) for name, target in targets.items()}
        if {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} != shapes:  # noqa: SIM118
            raise UserError(f"{path} {otherwise}")
        for name, target in targets.items():
            with gathered(target, write=True):
                whole = file.get_tensor(name).to(target.device)
                if isinstance(target, DTensor):
                    whole = distribute_tensor(whole, target.device_mesh, target.placements)
                local(target).copy_(local(whole))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
