"""What a taught language model answers in one call of its own: log-probabilities of some tokens, values, a loss.

The forward of a model, and that of its head, is wrapped in place: a call with a `head_call` runs the body, takes the
states that are asked for and hands them to the head, inside the modules' own calls, so that an engine's hooks gather
what it has cut up. Every other call goes on as before.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.objectives.distillation import Head
from shared.objectives.logprobs import HeadTransform, TokenStats, head_log_probs, head_objective
from shared.policies.base import CRITIC, GroupedBatch
from shared.policies.prefix import shared_hidden

TokenObjective = Callable[[Tensor, slice], Tensor]
AtHead = Callable[[Head | Tensor], tuple[Tensor | None, ...]]


@dataclass
class HeadCall:
    """What the patched head is asked to do with the counted tokens' hidden states."""

    index: Tensor  # (N,) positions in the flattened hidden states: (B*T,), or (B*(1+T),) with a shared prefix
    targets: Tensor  # (N,)
    transform: HeadTransform
    objective: TokenObjective | None = None
    entropy: bool = False
    collision: bool = False
    entropy_weights: Tensor | None = None  # (N,), with an objective
    entropy_gradient: bool = False  # without one
    prefix: GroupedBatch | None = None  # prompts to run once for their completions, in place of the other inputs
    values: Literal["beside", "alone"] | None = None  # of the states, by the model's critic; alone: nothing else
    at_head: AtHead | None = None  # what is done with the head, in the place of all that is asked above
    record: type = TokenStats  # what the figures beside the loss become
    half: bool = False  # said by the head: whether it ran in half precision


def teach(inner: nn.Module) -> bool:
    """Teach a model to answer a HeadCall; False where its shape does not allow it.

    The forward of the instance is wrapped rather than its class replaced: saving, generation, PEFT and the engines go
    on seeing the transformers model. What is wrapped belongs to `self`, so that a deep copy runs on its own weights.
    """
    body = getattr(inner, inner.base_model_prefix, None)
    if body is None or body is inner or not _linears(inner.get_output_embeddings()):
        return False

    def wrap(plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(self: nn.Module, *args: Any, head_call: HeadCall | None = None, **kwargs: Any):
            if head_call is None:
                return plain(self, *args, **kwargs)
            prefix = head_call.prefix

            def states(body: nn.Module) -> Tensor:
                hidden = body(*args, **kwargs)[0] if prefix is None else shared_hidden(body, prefix)
                return hidden.flatten(0, 1)[head_call.index]

            body = getattr(self, self.base_model_prefix)
            hidden = None if head_call.values == "alone" else states(body)
            values = getattr(self, CRITIC)(states, body, hidden) if head_call.values else None
            if hidden is None:
                return values.new_zeros(()), *TokenStats(None, None, None, values=values)
            head = self.get_output_embeddings()
            for linear in _linears(head):  # here, since an adapter or more tokens may have brought another one
                wrap_forward(linear, _head_forward, mark="takes_head_call")
            found = head(hidden, head_call=head_call)
            return found if values is None else (*found[:-1], values)

        return forward

    wrap_forward(inner, wrap, mark="takes_head_call")
    return True


def _head_forward(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def forward(self: nn.Linear, hidden: Tensor, head_call: HeadCall | None = None):
        if head_call is None:
            return plain(self, hidden)
        if head_call.at_head is not None:
            return head_call.at_head(Head(hidden, self.weight, self.bias, head_call.transform))
        halves = (torch.bfloat16, torch.float16)
        head_call.half = torch.is_autocast_enabled(hidden.device.type) or self.weight.dtype in halves
        options = {
            "bias": self.bias,
            "transform": head_call.transform,
            "entropy": head_call.entropy,
            "collision": head_call.collision,
        }
        inputs = (hidden, self.weight, head_call.targets)
        if head_call.objective is None:
            stats = head_log_probs(*inputs, **options, entropy_gradient=head_call.entropy_gradient)
            loss = stats.logp.new_zeros(())
        else:
            options["entropy_weights"] = head_call.entropy_weights
            loss, stats = head_objective(*inputs, head_call.objective, **options)
        return loss, *stats

    return forward


def wrap_forward(module: nn.Module, wrap: Callable[[Callable], Callable], *, mark: str) -> None:
    """Put `wrap(forward)` in the place of a module's forward, once: the attribute `mark` tells that it was done."""
    own = module.forward
    if getattr(own, mark, False):
        return
    if getattr(own, "__self__", None) is module:
        plain = own.__func__
    else:  # put there by somebody else, already bound

        @functools.wraps(own)
        def plain(_: nn.Module, *args: Any, **kwargs: Any):
            return own(*args, **kwargs)

    forward = wrap(plain)
    setattr(forward, mark, True)
    module.forward = types.MethodType(forward, module)


def _linears(head: nn.Module | None) -> list[nn.Linear]:
    """The linear layers behind a head, where PEFT trains a copy of it both; empty for any other kind of head."""
    found = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        found = [head.original_module, *head.modules_to_save.values()]
    # neither a quantised layer nor one with an adapter beside it: those are more than a matrix product
    plain = (isinstance(m, nn.Linear) and type(m).__name__.removeprefix("FSDP") == "Linear" for m in found)
    return found if all(plain) else []
