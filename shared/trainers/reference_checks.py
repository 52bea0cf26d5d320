"""What can be asked of a reference together: said before a model is loaded, and before a result is taken from disk."""

from __future__ import annotations

from typing import Any

from torch import nn

from shared.errors import UserError

STREAMED = (
    "precompute_ref_log_probs runs the reference over all rows beforehand, which streamed rows do not allow. Leave "
    "the option or the streaming out."
)


def is_inside(given: Any, model: nn.Module | str) -> bool:
    """Whether what is given is the model, or what its adapter is put on, so that training changes it too."""
    return isinstance(model, nn.Module) and any(each is given for each in model.modules())


def check_reference_options(
    model: nn.Module | str,
    ref_model: nn.Module | str | None,
    *,
    has_adapter: bool,
    num_shared_layers: int | None = None,
    load_in_8bit: bool = False,
    synced: bool = False,
    beforehand: bool = False,
) -> None:
    """What make_reference can say without model or engine.

    Args:
        model: the policy's model or its name.
        ref_model: the reference model or its name; None: the model as it is at the start.
        has_adapter: whether an adapter is trained on the model.
        num_shared_layers, load_in_8bit, synced: as make_reference.
        beforehand: the reference is run once, before training.

    Raises:
        UserError: options that exclude each other.
    """
    if is_inside(ref_model, model):
        raise UserError(
            "ref_model is the model itself, which training changes. Leave it out: the model as it is at the start is "
            "kept."
        )
    if beforehand and synced:
        raise UserError(
            "The reference is run once, before training, and is to be moved while training (sync_ref_model): these "
            "exclude each other. Leave one out."
        )
    if beforehand and num_shared_layers:
        raise UserError(
            "The reference is run once, before training, so that there is none to share layers with: "
            "num_shared_layers and precompute_ref_log_probs exclude each other. Leave one out."
        )
    if has_adapter and ref_model is None and (load_in_8bit or num_shared_layers):
        raise UserError(
            "The model has an adapter, so that the model without it is the reference: there is no second one to hold "
            "in 8 bits or to share layers with. Leave these options out, or give a reference model."
        )
    if num_shared_layers and (ref_model is not None or load_in_8bit or synced):
        raise UserError(
            "num_shared_layers makes the reference from the model itself: it excludes a given reference model, 8 bits "
            "and sync_ref_model."
        )
    if synced and load_in_8bit:
        raise UserError("A reference in 8 bits cannot be moved: leave out sync_ref_model or the 8 bits.")
    if synced and has_adapter and ref_model is not None:
        raise UserError(
            "sync_ref_model moves the reference towards the model, and an adapter does not fit into another model's "
            "weights. Leave the reference model out: a second adapter is then the reference."
        )


def check_reference_asked(
    model: nn.Module | str,
    ref_model: nn.Module | str | None,
    args: Any,
    *,
    has_adapter: bool,
    beforehand: bool = False,
) -> None:
    """check_reference_options and check_moves, by ReferenceModelOptions."""
    check_reference_options(
        model,
        ref_model,
        has_adapter=has_adapter,
        num_shared_layers=args.ref_num_shared_layers,
        load_in_8bit=args.ref_load_in_8bit,
        synced=args.sync_ref_model,
        beforehand=beforehand,
    )
    if args.sync_ref_model:
        check_moves(every=args.ref_model_sync_steps, alpha=args.ref_model_mixup_alpha)


def check_reference_used(args: Any, ref_model: Any) -> None:
    """Raise UserError where a trainer whose β is 0 is asked for a reference.

    Args:
        args: ReferenceModelOptions, with `beta`.
        ref_model: the trainer's argument.
    """
    asked = {"ref_model": ref_model is not None}
    names = ("ref_model_name_or_path", "ref_num_shared_layers", "ref_load_in_8bit", "sync_ref_model")
    asked |= {name: bool(getattr(args, name)) for name in names}
    if not args.beta and (given := [name for name, there in asked.items() if there]):
        raise UserError(
            f"{', '.join(given)}: there is no reference where beta is 0. Give beta, the weight of the divergence from "
            "it, or leave this out."
        )


def check_moves(*, every: int, alpha: float) -> None:
    """Raise UserError unless a reference can be moved every so many steps by so much."""
    if every < 1:
        raise UserError(f"ref_model_sync_steps is {every}: must be at least 1.")
    if not 0 < alpha <= 1:
        raise UserError(f"ref_model_mixup_alpha is {alpha}: must be above 0 and at most 1.")


def check_run_beforehand(rows: Any, batch_size: int | None) -> None:
    """Raise UserError unless a reference can be run over rows, as a trainer is given them, before training."""
    if batch_size is not None and batch_size < 1:
        raise UserError(f"precompute_ref_batch_size {batch_size}: must be at least 1.")
    if rows is not None and not hasattr(rows, "__len__"):
        raise UserError(STREAMED)
