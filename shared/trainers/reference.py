"""The reference of a preference trainer: who gives the log-probabilities that the policy is held near to.

| model            | reference given   | reference                                                            |
|------------------|-------------------|----------------------------------------------------------------------|
| with new adapter | none              | AdapterOff: the same model with its adapter off                      |
| adapter goes on  | none              | AdapterOff: a frozen second adapter, "reference", as it was at start |
| whole            | none              | FrozenCopy of the model as it was at start                           |
| any              | a model or a name | FrozenCopy of that                                                   |

Moving a reference while training: shared.trainers.reference_sync; running it once: shared.trainers.reference_cache.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn

from shared.builtin import is_builtin
from shared.errors import UserError
from shared.policies.base import ActionBatch, Policy
from shared.policies.prefix import evaluating
from shared.runtime.fsdp import reshard
from shared.runtime.references import create_reference_model, frozen
from shared.trainers.reference_adapter import (
    REFERENCE_ADAPTER,
    adapter_in_use,
    add_reference_adapter,
    adds_nothing,
    check_can_be_switched,
    keep_out_of_training,
    trained_adapter,
)
from shared.trainers.reference_checks import check_reference_options

Load = Callable[..., nn.Module]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


class Reference:
    """What a trainer asks for the log-probabilities of the reference.

    Attributes:
        synced: whether it is moved while training, so that checkpoints must hold it.
    """

    synced = False

    def log_probs(self, model: nn.Module, batch: ActionBatch) -> Tensor:
        """Log-probabilities of the completions' tokens.

        Args:
            model: the policy's model as the engine wraps it.
            batch: the rows, on the policy's device.

        Returns:
            `(B, T)` float32 without gradient; 0 where the objective does not count the token.
        """
        raise NotImplementedError

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """What is run for the reference's own answers, ready for it and without gradient, for a while.

        Args:
            model: the policy's model as the engine wraps it.
        """
        raise NotImplementedError

    def beside(self, model: nn.Module) -> contextlib.AbstractContextManager[tuple[nn.Module, Around]]:
        """What is run for the reference's part of answers that it writes together with the policy, for a while.

        Args:
            model: the policy's model as the engine wraps it, in evaluation mode.

        Returns:
            A model, and what gives a context for each of its passes: between them the policy may run.
        """
        raise NotImplementedError


class NoReference(Reference):
    """Zeros: an objective with no reference, or one that takes every answer to be equally likely at first."""

    def log_probs(self, model: nn.Module, batch: ActionBatch) -> Tensor:
        mask = batch.action_mask
        return torch.zeros(mask.shape, device=mask.device)


class Cached(Reference):
    """What was computed beforehand and came with the batch as `columns["ref_logp"]`, `(B, T)`.

    KL pairs have none: of a batch with them, ask for `batch.member(0)`.
    """

    def log_probs(self, model: nn.Module, batch: ActionBatch) -> Tensor:
        if "ref_logp" not in batch.columns:
            raise UserError(
                "These rows have no reference log-probabilities: with precompute_ref_log_probs the reference was run "
                "over the rows that the trainer was given. Give them as eval_dataset, or leave the option out."
            )
        logp = batch.columns["ref_logp"].float()
        assert logp.shape == batch.completion_mask.shape, "not all of the batch's answers have them"
        return torch.where(batch.completion_mask.bool(), logp, logp.new_zeros(()))


class AdapterOff(Reference):
    """The policy's own model, with its adapter off or with another one in its place.

    Args:
        policy: the trainer's policy.
        adapter: the adapter to run with; None for none. A model without an adapter is run as it is, which before
            training is its own reference.
    """

    def __init__(self, policy: Policy, adapter: str | None = None):
        self.policy = policy
        self.adapter = adapter

    def log_probs(self, model: nn.Module, batch: ActionBatch) -> Tensor:
        with self.running(model):
            return self.policy.log_probs(model, batch).logp.float()

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad(), evaluating(model), adapter_in_use(unwrapped(model), self.adapter):
            yield model

    @contextlib.contextmanager
    def beside(self, model: nn.Module) -> Iterator[tuple[nn.Module, Around]]:
        yield model, functools.partial(adapter_in_use, unwrapped(model), self.adapter)


class FrozenCopy(Reference):
    """A model of its own, frozen: whole on each device, or cut up where the engine cuts up the policy.

    Args:
        model: the reference model, in the type that it was loaded in; it is frozen in place.
        accelerator: of the trainer.
        policy: the trainer's policy, which gives the one around this model.
        share_prefix: run each prompt once for its completions, as the policy does.
    """

    def __init__(self, model: nn.Module, *, accelerator: Accelerator, policy: Policy, share_prefix: bool = True):
        self.policy = policy.around(frozen(model), share_prefix=share_prefix)
        self.accelerator = accelerator
        self.model = _prepared(model, accelerator)

    def log_probs(self, model: nn.Module, batch: ActionBatch) -> Tensor:
        with self.running(model) as own:
            return self.policy.log_probs(own, batch).logp.float()

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad(), self.accelerator.autocast():
            yield self.model
        if self.accelerator.is_fsdp2:
            reshard(self.model)

    @contextlib.contextmanager
    def beside(self, model: nn.Module) -> Iterator[tuple[nn.Module, Around]]:
        with self.running(model) as own:
            yield unwrapped(own), contextlib.nullcontext


def make_reference(
    model: nn.Module,
    ref_model: nn.Module | str | None = None,
    *,
    accelerator: Accelerator,
    policy: Policy,
    load: Load | None = None,
    name: str | None = None,
    share_prefix: bool = True,
    num_shared_layers: int | None = None,
    load_in_8bit: bool = False,
    synced: bool = False,
    beforehand: bool = False,
    precomputed: bool = False,
    needed: bool = True,
    adapter: str = REFERENCE_ADAPTER,
) -> Reference:
    """The reference for a model, by the table at the head of this module. To be called before training prepares it.

    Args:
        model: the policy's model, not yet wrapped.
        ref_model: the reference model or its name; None: the model as it is now.
        accelerator, policy: the trainer's.
        load: `load(name, quantization_config=…)` gives a model by name.
        name: what the policy's model was loaded from, where the trainer loaded it; None for a model given as such.
        share_prefix: whether a reference model of its own runs each prompt once for its completions, as the policy.
        num_shared_layers: layers that model and reference share; see create_reference_model.
        load_in_8bit: hold the reference's weights in 8 bits (bitsandbytes).
        synced: the reference is to be moved while training (see reference_sync).
        beforehand: it is run before training alone: a model that is its own reference is then not copied.
        precomputed: the rows hold its log-probabilities already: no model is loaded.
        needed: False where the objective has no reference.
        adapter: the name of the second adapter, where one is needed.

    Raises:
        UserError: options that exclude each other, a reference that cannot be had under this engine, or a model with
            an adapter that trains more than its adapter and so cannot be its own reference.
    """
    if not needed:
        return NoReference()
    check_reference_options(
        model,
        ref_model,
        has_adapter=hasattr(model, "peft_config"),
        num_shared_layers=num_shared_layers,
        load_in_8bit=load_in_8bit,
        synced=synced,
        beforehand=beforehand or precomputed,
    )
    if precomputed:
        return Cached()
    check_engine(accelerator, num_shared_layers=num_shared_layers, load_in_8bit=load_in_8bit, synced=synced)
    if hasattr(model, "peft_config") and ref_model is None:
        reference = _adapter_off(model, policy, synced, beforehand, adapter)
    elif beforehand and ref_model is None and not load_in_8bit:
        return AdapterOff(policy)
    else:
        own = _reference_model(model, ref_model, load, name, num_shared_layers, load_in_8bit)
        if synced:
            _check_alike(model, own)
        reference = FrozenCopy(own, accelerator=accelerator, policy=policy, share_prefix=share_prefix)
    reference.synced = synced
    return reference


def check_engine(
    accelerator: Accelerator, *, num_shared_layers: int | None = None, load_in_8bit: bool = False, synced: bool = False
) -> None:
    """Raise UserError for what cannot be had under the trainer's engine; the options are make_reference's."""
    engine = accelerator.distributed_type
    if num_shared_layers and (engine == DistributedType.FSDP or _zero3(accelerator)):
        raise UserError("num_shared_layers: an engine that cuts weights up (ZeRO-3, FSDP) cannot share them.")
    if load_in_8bit and _zero3(accelerator):
        raise UserError("A reference in 8 bits cannot be loaded under ZeRO-3: leave it whole, or use ZeRO-2.")
    if synced and engine == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("sync_ref_model does not work with FSDP 1: use FSDP 2 (--accelerate_config fsdp2) or ZeRO.")


def _adapter_off(model: Any, policy: Policy, synced: bool, beforehand: bool, name: str) -> AdapterOff:
    """The model with an adapter as its own reference."""
    check_can_be_switched(model, trains_nothing_else=not beforehand)
    if name in model.peft_config:
        keep_out_of_training(model, name)
    elif not synced and adds_nothing(model):
        return AdapterOff(policy)
    elif beforehand:
        return AdapterOff(policy, trained_adapter(model))  # nothing has changed it yet
    else:
        add_reference_adapter(model, name)
    return AdapterOff(policy, name)


def _reference_model(
    model: nn.Module,
    ref_model: nn.Module | str | None,
    load: Load | None,
    name: str | None,
    num_shared_layers: int | None,
    load_in_8bit: bool,
) -> nn.Module:
    """The model that a FrozenCopy holds: given, loaded, or copied from the policy's."""
    cut_up = any(hasattr(p, "ds_id") for p in model.parameters())
    if ref_model is None and cut_up:
        ref_model = name or model.config._name_or_path
        if not ref_model:
            raise UserError(
                "Under ZeRO-3 the reference is loaded a second time, and this model does not say where from. Give "
                "the model by name, or a reference model."
            )
    if load_in_8bit:
        source = ref_model if ref_model is not None else name
        if _is_builtin(source):  # which transformers does not load, and so not quantise
            source = model if ref_model is None else load(ref_model)
        return _in_8_bits(model if source is None else source, load)
    if ref_model is None:
        return create_reference_model(model, num_shared_layers)
    return load(ref_model) if isinstance(ref_model, str) else ref_model


def _is_builtin(source: nn.Module | str | None) -> bool:
    return isinstance(source, str) and is_builtin(source)


def _in_8_bits(model: nn.Module | str, load: Load) -> nn.Module:
    """A model loaded in 8 bits by its name, or as it is now by way of a folder: transformers quantises at loading."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if isinstance(model, str):
        return load(model, quantization_config=config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder, quantization_config=config)


def _check_alike(model: nn.Module, reference: nn.Module) -> None:
    def shapes(of: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in of.named_parameters()}

    if shapes(model) != shapes(reference):
        raise UserError(
            "sync_ref_model: the reference must have the same parameters as the model, and its names or shapes "
            "differ. Leave the reference model out, or name one of the same architecture and size."
        )


# ---- Engines -------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what an engine or torch.compile wrapped around it."""
    return extract_model_from_parallel(model)


def _zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin is not None and plugin.zero_stage == 3


def _prepared(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model where it can be run beside the policy. It is never wrapped for training, nor known to accelerate:
    accelerate would save it with each checkpoint."""
    if getattr(model, "is_quantized", False):
        return model  # placed when it was loaded
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if _zero3(accelerator):
            return _cut_up_by_deepspeed(model, accelerator)
        return model.to(accelerator.device, half)  # DeepSpeed casts its model too, and has no autocast
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP:
        wrapped = accelerator.prepare_model(model)
        accelerator._models.remove(wrapped if wrapped in accelerator._models else model)
        return wrapped
    return model.to(accelerator.device)


def _cut_up_by_deepspeed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model in an engine without an optimizer, with the policy's own settings of how weights are cut up."""
    import deepspeed

    settings: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    kept = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "offload_param")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **{k: settings[k] for k in kept if settings.get(k, "auto") != "auto"}},
        "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
        "fp16": {"enabled": accelerator.mixed_precision == "fp16"},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
