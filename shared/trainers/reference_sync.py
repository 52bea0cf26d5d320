"""A reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656), and its checkpoints.

θ_ref ← α θ + (1−α) θ_ref, every so many steps. Of a LoRA adapter the factors A and B are mixed, not their product:
exact at α = 1, and below that the reference is a LoRA adapter of the same rank near the mixture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from shared.errors import UserError
from shared.trainers.reference import AdapterOff, FrozenCopy, Reference, unwrapped
from shared.trainers.reference_adapter import adapter_tensors, gathered, trained_adapter
from shared.trainers.reference_checks import check_moves
from shared.trainers.tensor_files import local, read_tensors, write_tensors

REFERENCE_FILE = "reference.safetensors"


@torch.no_grad()
def sync_reference(policy_model: nn.Module, reference: Reference, *, alpha: float) -> None:
    """Move the reference towards the policy: θ_ref ← α θ + (1−α) θ_ref. All processes call it together.

    Args:
        policy_model: the trainer's model, wrapped or not.
        reference: made by `make_reference(…, synced=True)`.
        alpha: α in [0, 1]; 1 puts the policy in the reference's place.

    Raises:
        UserError: α out of range, or a reference that was not made to be moved.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"ref_model_mixup_alpha is {alpha}: must be at least 0 (no move) and at most 1 (replace).")
    targets = _weights(policy_model, reference)
    if isinstance(reference, AdapterOff):
        inner = unwrapped(policy_model)
        sources = adapter_tensors(inner, trained_adapter(inner))
    else:
        sources = dict(unwrapped(policy_model).named_parameters())
    for name, target in targets.items():
        with gathered(sources[name]), gathered(target, write=True):
            here, there = local(target), local(sources[name])
            if here.is_floating_point():
                here.lerp_(there.to(here.dtype), alpha)


class SyncReference(TrainerCallback):
    """Moves the reference after every `every` optimizer steps.

    Args:
        reference: made by `make_reference(…, synced=True)`.
        every: steps between two moves (the paper's τ).
        alpha: share of the policy in the reference at each move.

    Raises:
        UserError: numbers out of range, or a reference that was not made to be moved.
    """

    def __init__(self, reference: Reference, *, every: int, alpha: float):
        check_moves(every=every, alpha=alpha)
        if not reference.synced:
            raise UserError("This reference is not made to be moved: make it with make_reference(…, synced=True).")
        self.reference, self.every, self.alpha = reference, every, alpha

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step % self.every == 0:
            sync_reference(model, self.reference, alpha=self.alpha)


def save_reference(
    policy_model: nn.Module, reference: Reference, folder: str | Path, *, writes: bool, file: str = REFERENCE_FILE
) -> None:
    """Write a reference that is moved beside a checkpoint; nothing for one that stays as it was at the start.

    Args:
        policy_model: the trainer's model, wrapped or not.
        reference: the trainer's reference.
        folder: the checkpoint.
        writes: whether this process writes. All processes call it together, since weights may be cut up.
        file: its name there.
    """
    if not reference.synced:
        return
    write_tensors(_weights(policy_model, reference), Path(folder) / file, writes=writes)


def load_reference(
    policy_model: nn.Module, reference: Reference, folder: str | Path, *, file: str = REFERENCE_FILE
) -> None:
    """Put back a reference that was moved, from a checkpoint. All processes call it together.

    Raises:
        UserError: the checkpoint holds none, or that of another model.
    """
    if not reference.synced:
        return
    path = Path(folder) / file
    if not path.is_file():
        raise UserError(f"{folder} holds no {file}: it was written by a run without a reference that moves.")
    otherwise = "holds another model's reference. Resume with the options of the run; see run.yaml."
    read_tensors(_weights(policy_model, reference), path, otherwise=otherwise)


def _weights(policy_model: nn.Module, reference: Reference) -> dict[str, Tensor]:
    """The reference's own tensors: an adapter's, or a model's parameters."""
    if isinstance(reference, FrozenCopy) and reference.synced:
        return dict(unwrapped(reference.model).named_parameters())
    if isinstance(reference, AdapterOff) and reference.synced and reference.adapter is not None:
        return adapter_tensors(unwrapped(policy_model), reference.adapter)
    raise UserError("This reference is not made to be moved: make it with make_reference(…, synced=True).")
