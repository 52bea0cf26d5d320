"""What FSDP2 checkpoints need beyond accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace


@contextlib.contextmanager
def unused_parameters_allowed() -> Iterator[None]:
    """Let an optimizer's state be loaded where parameters that the loss never reached have none.

    LLaVA's vision tower has such parameters: its last normalisation comes after the layer that is read. torch refuses
    to load a checkpoint without a state for each trained parameter; accelerate offers no way to say otherwise.
    """
    from torch.distributed.checkpoint import state_dict

    strict = state_dict.set_optimizer_state_dict

    def lenient(model, optimizers, optim_state_dict, *, options=None):
        options = replace(options or state_dict.StateDictOptions(), strict=False)
        return strict(model, optimizers, optim_state_dict, options=options)

    state_dict.set_optimizer_state_dict = lenient
    try:
        yield
    finally:
        state_dict.set_optimizer_state_dict = strict


def reshard(model) -> None:
    """Give back what the last forward pass gathered; without a backward pass the head's weights would stay whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
