"""The reference run once, before training: what stands for its weights, and whether it has to be loaded for that.

What is computed, and how it is kept: shared.trainers.reference_cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.runtime.models import HUB_OPTIONS, load_config
from shared.trainers.reference import FrozenCopy, Reference
from shared.trainers.reference_cache import weights_of_model, weights_of_name


def run_beforehand(
    trainer: Any,
    ref_model: str | nn.Module | None,
    made: Callable[[bool], Reference],
    *,
    name: str | None,
    all_known: bool = True,
) -> None:
    """Put the reference's log-probabilities beside a trainer's rows; nothing is loaded where they are known already.

    Args:
        trainer: a Referenced one, with its model, rows and collator.
        ref_model: the reference model or its name; None: the model as it is.
        made: makes the reference, to be run beforehand or, where its argument is False, to stand by itself.
        name: what the policy's model was loaded from; None for a model given as such.
        all_known: whether policy and reference have all of their weights from where they were loaded: those that are
            drawn depend on the seed.
    """
    args, model = trainer.args, trainer.model
    zero3 = is_deepspeed_zero3_enabled()  # a model that is cut up runs in its engine alone
    quantised = getattr(model, "is_quantized", False)
    if not zero3 and not quantised:
        model.to(args.device)
    own = ref_model is None
    source = ref_model if isinstance(ref_model, str) else name if own else None
    named = all_known and not args.ref_load_in_8bit and not (own and (quantised or hasattr(model, "peft_config")))
    weights = None
    if source is not None and named:
        init = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("dtype", "torch_dtype")}
        held = _types_of(model) if own and not zero3 else _type_when_loaded(source, trainer)
        weights = weights_of_name(source, dtype=held, **init)
    reference: Reference | Callable[[], Reference] = lambda: made(not zero3)  # noqa: E731
    if weights is None:
        reference = made(not zero3)
        weights = weights_of_model(reference.model if isinstance(reference, FrozenCopy) else model, reference)
    options = {
        "weights": weights,
        "model": model,
        "accelerator": trainer.accelerator,
        "batch_size": args.precompute_ref_batch_size or args.per_device_train_batch_size,
    }
    held_out = trainer.eval_dataset
    trainer.train_dataset = trainer.with_reference(reference, trainer.train_dataset, what="train", **options)
    if isinstance(held_out, dict):
        trainer.eval_dataset = {
            what: trainer.with_reference(reference, rows, what=what, **options) for what, rows in held_out.items()
        }
    elif held_out is not None:
        trainer.eval_dataset = trainer.with_reference(reference, held_out, what="eval", **options)


def config_of(name: str, args: Any) -> Any:
    """The configuration of a reference model that is given by name. Raises UserError where it is not there."""
    init = args.model_init_kwargs or {}
    return load_config(name, **{option: init[option] for option in HUB_OPTIONS if option in init})


def _types_of(model: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _type_when_loaded(name: str, trainer: Any) -> str:
    """The type that a frozen model's weights are held in; "auto" where its configuration does not say."""
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    if half and trainer.accelerator.distributed_type == "DEEPSPEED":
        return half  # whatever it was loaded in
    init = trainer.args.model_init_kwargs or {}
    asked = init.get("torch_dtype", init.get("dtype", "auto"))
    if asked == "auto":
        asked = getattr(config_of(name, trainer.args), "dtype", None) or "auto"
    return str(asked).removeprefix("torch.")
