"""Log-probabilities of chosen tokens, straight from hidden states: the logits of all tokens never exist at once.

The language-model head is applied to the counted tokens alone, some rows at a time. Two ways to use it:

- `head_objective`, for a loss that is a sum over tokens of a function of each token's log-probability: the gradients
  are computed in the forward pass, while a chunk's softmax is at hand. Three matrix products a chunk.
- `head_log_probs`, for anything else: differentiable log-probabilities. The backward pass runs the head again, so four
  matrix products a chunk.

Either can give the entropies of the distributions a gradient too, as a bonus for exploration, out of buffers that are
there anyway. Both work on plain tensors: a head that an engine shards is to be gathered by whoever calls. They give
one log-probability a token, so an objective on the whole distribution (label smoothing, a divergence) is not served
here. Neither can be differentiated twice.

Dimension letters: N counted tokens, V vocabulary, H hidden size, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.objectives.head_chunks import ChunkedHead, HeadTransform, Plan, TokenStats, no_autocast

TokenObjective = Callable[[Tensor, slice], Tensor]


def head_log_probs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    transform: HeadTransform | None = None,
    chunk_size: int | None = None,
    entropy: bool = False,
    collision: bool = False,
    entropy_gradient: bool = False,
) -> TokenStats:
    """Log-probability of each target under `softmax(transform(hidden @ weight.T + bias))`.

    Extra memory: a chunk's logits, and where the weight is trained in half precision its gradient in float32.

    Args:
        hidden_NH: `(N, H)` hidden states of the counted tokens. N may be 0.
        weight_VH: `(V, H)` the head's weight.
        targets_N: `(N,)` token ids, each in [0, V).
        bias: `(V,)`.
        transform: what the model does to its logits; None: nothing.
        chunk_size: rows of logits that exist at once; None: chosen by V and H.
        entropy: also give the entropies.
        collision: also give the log collision probabilities log Σ_v p_v² (no gradient flows through them).
        entropy_gradient: give the entropies, differentiable.

    Returns:
        The tokens' figures; `logp` is differentiable in hidden, weight and bias, and so is `entropy` if asked for.
    """
    transform = transform or HeadTransform()
    wanted = {"entropy": entropy, "collision": collision, "entropy_gradient": entropy_gradient}
    plan = Plan.of(hidden_NH, transform, chunk_size, **wanted)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias)):
        return TokenStats(*_HeadLogProbs.apply(hidden_NH, weight_VH, bias, targets_N, plan))
    with no_autocast(hidden_NH):
        return ChunkedHead(hidden_NH, weight_VH, bias, targets_N, plan).all_stats()


def head_objective(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    objective: TokenObjective,
    *,
    bias: Tensor | None = None,
    transform: HeadTransform | None = None,
    chunk_size: int | None = None,
    entropy: bool = False,
    collision: bool = False,
    entropy_weights: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """Sum over tokens of an objective of their log-probabilities, with its gradients computed in the forward pass.

    The backward pass only multiplies the stored gradients, in place, by the gradient that comes in: it can run once.
    Gradients reach hidden, weight and bias; a tensor that the objective captures gets none.

    Args:
        hidden_NH, weight_VH, targets_N, bias, transform, chunk_size, entropy, collision: see `head_log_probs`.
        objective: gets the log-probabilities `(n,)` of some tokens and the slice of the N tokens that they are; gives
            their losses `(n,)`, weighted: `lambda logp, part: -weights_N[part] * logp`. Not called when N is 0.
        entropy_weights: `(N,)` w: adds `Σ w · entropy` to the loss, with its gradient; negative for a bonus. The
            entropies are then among the figures.

    Returns:
        The scalar loss, and the tokens' figures without gradient. With N = 0 the loss is 0 and so are its gradients.
    """
    transform = transform or HeadTransform()
    entropy = entropy or entropy_weights is not None
    plan = Plan.of(hidden_NH, transform, chunk_size, entropy=entropy, collision=collision)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_NH, weight_VH, bias)):
        loss, *stats = _HeadObjective.apply(hidden_NH, weight_VH, bias, targets_N, objective, entropy_weights, plan)
        return loss, TokenStats(*stats)
    with no_autocast(hidden_NH), torch.no_grad():
        head = ChunkedHead(hidden_NH, weight_VH, bias, targets_N, plan)
        stats = head.all_stats()
        losses = [objective(stats.logp[part], part).sum() for part in head.parts]
        if entropy_weights is not None:
            losses.append((stats.entropy * entropy_weights.to(stats.entropy)).sum())
        return sum(losses, start=stats.logp.new_zeros(())), stats


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: Plan):
        ctx.plan = plan
        # The parameter itself is saved, not a cast or gathered copy: an engine that shards it finds it again.
        ctx.save_for_backward(hidden, weight, bias, targets)
        with no_autocast(hidden):
            stats = ChunkedHead(hidden, weight, bias, targets, plan).all_stats()
        fixed = stats._replace(logp=None, entropy=None if plan.entropy_gradient else stats.entropy)
        ctx.mark_non_differentiable(*(t for t in fixed if t is not None))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor | None, *_: Tensor):
        hidden, weight, bias, targets = ctx.saved_tensors
        plan = replace(ctx.plan, entropy=ctx.plan.entropy_gradient, collision=False)
        with no_autocast(hidden):
            head = ChunkedHead(hidden, weight, bias, targets, plan, ctx.needs_input_grad[:3])
            for part in head.parts:
                head.stats(part)
                head.add_gradients(part, logp_gradient[part], entropy_gradient[part] if plan.entropy else None)
        return *_cast(head.gradients(), _dtypes(hidden, weight, bias)), None, None


class _HeadObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        objective: TokenObjective,
        entropy_weights: Tensor | None,
        plan: Plan,
    ):
        with no_autocast(hidden):
            head = ChunkedHead(hidden, weight, bias, targets, plan, ctx.needs_input_grad[:3])
            collected = head.empty_stats()
            loss = collected.stats.logp.new_zeros(())
            for part in head.parts:
                stats = head.stats(part)
                collected.put(part, stats)
                part_loss, logp_gradient = _token_gradient(objective, stats.logp, part)
                loss += part_loss
                entropy_gradient = None
                if entropy_weights is not None:
                    entropy_gradient = entropy_weights[part].to(stats.entropy)
                    loss += (stats.entropy * entropy_gradient).sum()
                head.add_gradients(part, logp_gradient, entropy_gradient)
        # Not by save_for_backward: that would hold on to them, and so force a second copy of the weight's gradient.
        ctx.gradients = head.gradients()
        ctx.dtypes = _dtypes(hidden, weight, bias)
        stats = collected.stats
        ctx.mark_non_differentiable(*(t for t in stats if t is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of head_objective were used up by an earlier backward pass. Call it again, or use "
                "head_log_probs, which allows backward(retain_graph=True)."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(loss_gradient) for g in gradients]
        return *_cast(scaled, ctx.dtypes), None, None, None, None


def _token_gradient(objective: TokenObjective, logp: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk and its derivative by each log-probability `(n,)`."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss = objective(logp, part).sum()
        if not loss.requires_grad:
            return loss, torch.zeros_like(logp)
        (gradient,) = torch.autograd.grad(loss, logp, materialize_grads=True)
    return loss.detach(), gradient


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _cast(gradients: list[Tensor | None], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """Each gradient in the type of the tensor that it belongs to."""
    return [None if g is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True)]
