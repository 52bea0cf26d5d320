"""Frozen copies of a model to compare it with, whole or sharing its lower layers with it.

With shared layers the policy's pass over a batch leaves what comes out of the last of them, and the reference's pass
over the same batch begins there: they are held once and computed once. This file knows nothing of objectives, and
nothing of engines: parameters that an engine has cut up cannot be copied here.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from shared.errors import UserError

STACKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "transformer.blocks")
AFTER_THE_LAYERS = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm", "project_out")
PLAIN_CACHES = (DynamicLayer, DynamicSlidingWindowLayer)


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A frozen copy of a model as it is now, in evaluation mode.

    With `num_shared_layers=k` the first k layers and the embeddings before them are frozen in both models and are the
    same parameters in both; so is a head that is tied to the embeddings. They stay in evaluation mode while the policy
    trains: dropout below would make the two models see different states. A pass of the copy over inputs that the
    policy has just run goes on from the policy's state after layer k, be it whole rows or prompts that are run once
    for their completions; over any other inputs the layers themselves run. So that the inputs are the same, give the
    policies of both models the same `share_prefix`.

    Args:
        model: a transformers model, not wrapped or cut up by an engine. With shared layers it is changed in place.
        num_shared_layers: k, at least 1 and fewer than the model has; None copies everything.
        pattern: where the layers stand, for example `transformer.h.{layer}`; found by itself for the usual models.

    Returns:
        The copy. `shared_layers(copy)` tells k.

    Raises:
        UserError: a model with an adapter, parameters cut up by DeepSpeed, unknown layers, or k out of range.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "The model has an adapter: it needs no copy, since with its adapter off it is its own reference. "
            "Leave the reference model out."
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError(
            "The model's weights are cut up by DeepSpeed ZeRO-3 and cannot be copied. Give the reference model by "
            "name, so that it is loaded a second time."
        )
    if num_shared_layers is None:
        return frozen(copy.deepcopy(model))
    if model.config.get_text_config() is not model.config:
        raise UserError(
            "num_shared_layers is for text models: vision-language models can feed images to layers in the middle. "
            "Leave it out to copy the whole model."
        )
    path, layers = _layers(model, pattern)
    if not 1 <= num_shared_layers < len(layers):
        raise UserError(
            f"num_shared_layers is {num_shared_layers}; this model has {len(layers)} layers at {path}, of which 1 to "
            f"{len(layers) - 1} can be shared. Leave it out to copy the whole model."
        )
    below = [*_before_layers(model, path), *layers[:num_shared_layers]]
    shared = {id(p): p for module in below for p in module.parameters()}
    reference = frozen(copy.deepcopy(model, dict(shared)))
    for module in below:
        module.requires_grad_(False)
        module.eval()
        module.train = types.MethodType(_stay_in_evaluation, module)
    _compute_once(layers[:num_shared_layers], reference.get_submodule(path)[:num_shared_layers])
    reference.num_shared_layers = num_shared_layers
    return reference


def frozen(model: nn.Module) -> nn.Module:
    """The model itself, in evaluation mode and with no gradient."""
    return model.eval().requires_grad_(False)


def shared_layers(reference: nn.Module) -> int:
    """How many layers a reference shares with its policy; 0 for a model of its own."""
    return getattr(reference, "num_shared_layers", 0)


def _layers(model: nn.Module, pattern: str | None) -> tuple[str, nn.ModuleList]:
    if pattern is not None and not pattern.endswith(".{layer}"):
        raise UserError(
            f"pattern {pattern!r}: must be the path of a layer, ending in .{{layer}}: transformer.h.{{layer}}"
        )
    paths = STACKS if pattern is None else (pattern.removesuffix(".{layer}"),)
    modules = dict(model.named_modules())
    for path in paths:
        if isinstance(found := modules.get(path), nn.ModuleList):
            return path, found
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    raise UserError(
        f"num_shared_layers: {type(model).__name__} has no list of layers at {' or '.join(paths)}; it has "
        f"{', '.join(lists) or 'none'}. Name it with pattern, for example 'transformer.h.{{layer}}'."
    )


def _before_layers(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules beside the layers that run before the first of them."""
    parent, _, own = path.rpartition(".")
    beside = model.get_submodule(parent).named_children()
    return [module for name, module in beside if name != own and name not in AFTER_THE_LAYERS]


def _stay_in_evaluation(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


@dataclass(eq=False)  # tensors are not equal or unequal as a whole
class _Pass:
    """What the shared layers made of their inputs, in one call of the model's body."""

    inputs: tuple  # of the first layer
    output: Any = None  # of the last one
    cached: Sequence[DynamicLayer] = ()  # keys and values after it, where there was a cache


class _Memory:
    """The policy's last passes through the shared layers, until the reference asks for them.

    Two of them: a policy that shares prefixes calls its body for the prompts and then for the completions.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self.running: _Pass | None = None  # the policy's pass that is between the first layer and the last one
        self.passes: deque[_Pass] = deque(maxlen=2)
        self.recalled: Any = None  # the output that the reference's layers are to give

    def note_inputs(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self._inputs(args, kwargs)
        self.running = _Pass(_detached(inputs)) if _comparable(inputs) else None

    def note_output(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if (done := self.running) is None:
            return
        self.running = None
        done.output = _detached(output)
        if (cache := _cache(args, kwargs)) is not None:
            # keys and values are replaced and never changed in place as the cache grows: these stay as they are now
            done.cached = [copy.copy(each) for each in cache.layers[: self.layers]]
        self.passes.append(done)

    def recall(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take the pass over these very inputs out of memory, if there was one, and fill the cache as it did."""
        inputs = self._inputs(args, kwargs) if self.passes else None
        known = next((each for each in self.passes if _same(each.inputs, inputs)), None)
        self.recalled = None if known is None else known.output
        if known is None:
            return
        self.passes.remove(known)
        if (cache := _cache(args, kwargs)) is not None:
            cache.layers[: self.layers] = known.cached

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All that decides what the layers give, in one order; a cache by the keys and values that they find in it."""

        def known(value: Any) -> Any:
            if type(value) is not DynamicCache or any(type(each) not in PLAIN_CACHES for each in value.layers):
                return value
            found = (each for each in value.layers[: self.layers] if each.is_initialized)
            return tuple((each.keys, each.values, each.get_seq_length()) for each in found)

        named = (item for name in sorted(kwargs) for item in (name, known(kwargs[name])))
        return (*map(known, args), *named)


def _compute_once(policy_layers: nn.ModuleList, reference_layers: nn.ModuleList) -> None:
    """Let the reference's lower layers give what the policy's made of the same inputs, where they did."""
    memory = _Memory(len(policy_layers))
    policy_layers[0].register_forward_pre_hook(memory.note_inputs, with_kwargs=True)
    policy_layers[-1].register_forward_hook(memory.note_output, with_kwargs=True)

    def recalling(plain: Callable, first: bool, last: bool) -> Callable:
        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, **kwargs: Any):
            if first:
                memory.recall(args, kwargs)
            if (output := memory.recalled) is None:
                return plain(self, *args, **kwargs)
            if last:
                memory.recalled = None
            return output  # of the last layer: the ones between hand it on

        return forward

    for number, layer in enumerate(reference_layers):
        # the forward of the instance is wrapped and no module put between: parameters keep their names
        forward = recalling(type(layer).forward, number == 0, number == len(reference_layers) - 1)
        layer.forward = types.MethodType(forward, layer)


def _cache(args: tuple, kwargs: dict[str, Any]) -> DynamicCache | None:
    return next((value for value in (*args, *kwargs.values()) if type(value) is DynamicCache), None)


def _comparable(value: Any) -> bool:
    """Whether `_same` can tell two of these apart; other caches, or what layers hand on by changing it, it cannot."""
    if isinstance(value, tuple):
        return all(map(_comparable, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
        return alike and bool((left == right).all())
    return left == right
