"""Activations kept in the processor's memory between forward and backward pass, where the model runs on a GPU.

What autograd saves for the backward pass is copied out by a stream of its own while the forward pass goes on, and back
when the backward pass asks for it. Weights stay where they are, and what is saved several times is copied once.
Gradient checkpointing goes well with it: then the layers' inputs alone are saved, and they are what is copied.
The copies have not been timed or run on a GPU by the tests.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST_BYTES = 4096  # smaller tensors cost more to copy than to keep


class _Away:
    """A tensor that is in the processor's memory for now."""

    def __init__(self, host: Tensor, device: torch.device):
        self.host, self.device = host, device
        self.back: weakref.ref[Tensor] | None = None


class ActivationOffloading:
    """Moves what the backward pass needs to another memory, for forward passes within `with offloading():`.

    Args:
        model: its weights are not moved, wherever it is saved for the backward pass.
        home: the device that is copied to. Tensors that are there already are left alone: on a processor nothing is
            copied.
        least_bytes: smaller tensors stay.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> with ActivationOffloading(model)():
        ...     loss = model(torch.ones(3, 4)).square().sum()
        >>> loss.backward()
    """

    def __init__(self, model: nn.Module, *, home: torch.device | str = "cpu", least_bytes: int = LEAST_BYTES):
        self.model, self.home, self.least_bytes = model, torch.device(home), least_bytes
        self.copied = 0  # tensors, in all forward passes
        self._streams: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        # by where they are now: an engine that shards a model gives its weights other memory
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.model.parameters()}
        seen: dict[tuple, tuple[StorageWeakRef, _Away]] = {}

        def pack(tensor: Tensor) -> Any:
            if not self._movable(tensor) or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            storage = StorageWeakRef(tensor.untyped_storage())  # as long as it is held no other storage is mistaken
            key = storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
            if key not in seen or seen[key][0].expired():
                seen[key] = storage, self._send(tensor)
            return seen[key][1]

        with saved_tensors_hooks(pack, self._fetch):
            yield

    def _movable(self, tensor: Tensor) -> bool:
        return (
            self._is_elsewhere(tensor)
            and tensor.layout is torch.strided
            and type(tensor) is Tensor
            and tensor.nbytes >= self.least_bytes
            and 0 not in tensor.stride()  # expanded: the copy would be larger than what it frees
        )

    def _is_elsewhere(self, tensor: Tensor) -> bool:
        return tensor.device != self.home

    def _send(self, tensor: Tensor) -> _Away:
        self.copied += 1
        if tensor.device.type != "cuda":
            return _Away(tensor.detach().to(self.home, copy=True), tensor.device)
        stream = self._stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host = torch.empty_like(tensor, device=self.home, pin_memory=True, requires_grad=False)
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)  # its memory is free for others when it is copied, not earlier
        return _Away(host, tensor.device)

    def _fetch(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Away):
            return kept
        if kept.back is not None and (back := kept.back()) is not None:
            return back
        if kept.device.type != "cuda":
            back = kept.host.to(kept.device)
        else:
            stream, current = self._stream(kept.device), torch.cuda.current_stream(kept.device)
            with torch.cuda.stream(stream):
                back = kept.host.to(kept.device, non_blocking=True)
            current.wait_stream(stream)
            back.record_stream(current)
        kept.back = weakref.ref(back)
        return back

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
