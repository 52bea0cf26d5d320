"""Each prompt run once for all of its completions.

The body of a transformers model runs the left-padded prompts `(P, L)`, its key/value cache is repeated for the group
with its gradient, and the completions `(P*G, T)` run on top of it. The figures are those of whole rows, up to
rounding; where dropout is active its draws differ, since it draws once for a prompt and not G times.

Two steps, for a policy with any kind of head: `PrefixSharing.applies` says whether to share a batch, alike on every
process of a sharded model; `shared_hidden`, called inside the one forward that the engine wraps, gives the states.
A score head reads a completion of n tokens at column n of them, a language-model head reads token t at column t.

What a parameter gets as gradient from both runs is added up before an engine sees it: full fine-tuning under an engine
that shards gradients holds them whole for the length of the backward pass.

Nothing here knows of a head, a log-probability or a loss.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.policies.base import GroupedBatch
from shared.policies.positions import continue_from_last

logger = logging.getLogger(__name__)

# Gives the figures of a batch by the one path or the other, and whether any of it ran in half precision.
Figures = Callable[[GroupedBatch, bool], tuple[Tensor, bool]]

_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# The tokens saved have to pay for a second run of every layer, which is small but not free.
_WORTH = 0.9
_CANNOT = -(2.0**40)  # outweighs whatever all other processes save
_MODEL_CANNOT = (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, IndexError)


def along_prompt(batch: GroupedBatch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The extras of a batch that stand beside the prompts' tokens, `(P, L, ...)` (token_type_ids), and all others."""
    shape, extras = batch.prompt_ids.shape, batch.model_inputs
    along = {k: v for k, v in extras.items() if isinstance(v, Tensor) and v.shape[:2] == shape and shape[1]}
    return along, {k: v for k, v in extras.items() if k not in along}


def along_completions(name: str, values: Tensor, batch: GroupedBatch) -> Tensor:
    """What stands beside the completions' tokens, for an extra that stands beside the prompts' `(P, L, ...)`."""
    last = values[:, -1:].repeat_interleave(batch.group_size, 0)
    if name in batch.beyond:
        last = torch.full_like(last, batch.beyond[name])
    return last.expand(-1, batch.completion_ids.shape[1], *values.shape[2:])


def trimmed(batch: GroupedBatch, width: int | None = None) -> GroupedBatch:
    """The batch without the prompt columns that are padding in every row, and with `width` completion columns.

    Args:
        width: T of the result, at least 1; None: the tokens of the longest completion.
    """
    left = batch.prompt_ids.shape[1] - int(batch.prompt_mask.sum(1).max())
    width = max(int(batch.completion_attention.sum(1).max()) if width is None else width, 1)
    along, others = along_prompt(batch)
    return replace(
        batch,
        prompt_ids=batch.prompt_ids[:, left:],
        prompt_mask=batch.prompt_mask[:, left:],
        completion_ids=batch.completion_ids[:, :width],
        completion_attention=batch.completion_attention[:, :width],
        completion_mask=batch.completion_mask[:, :width],
        model_inputs=others | {k: v[:, left:] for k, v in along.items()},
        columns={},
    )


def shared_hidden(body: nn.Module, batch: GroupedBatch) -> Tensor:
    """Hidden states of the completions, each prompt run once.

    Args:
        body: a transformers model without its head, called as its own `forward` would be: `input_ids,
            attention_mask, position_ids, cache, use_cache`.
        batch: prompts `(P, L)` with L > 0, completions `(P*G, T)` with T > 0; what its model_inputs hold beside the
            prompts' tokens (images) goes with the prompts. `trimmed` spares the work on padding.

    Returns:
        `(P*G, 1+T, H)`: column 0 is the prompt's last state, column t + 1 the state at completion token t. So column t
        is the state that predicts completion token t, and column n the state at the last of n tokens, also for n = 0.
    """
    along, others = along_prompt(batch)

    def group(values: Tensor) -> Tensor:
        return values.repeat_interleave(batch.group_size, 0)

    # Vision models that rotate by image coordinates place the prompt's tokens themselves.
    own_positions = bool(others) and hasattr(body, "rope_deltas")
    takes_positions = "position_ids" in inspect.signature(body.forward).parameters
    where = {}
    if takes_positions and not own_positions:
        where["position_ids"] = (batch.prompt_mask.cumsum(1) - 1).clamp(min=0)
    prompt = body(
        input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask, use_cache=True, **where, **batch.model_inputs
    )
    name = _cache_name(body)
    cache = getattr(prompt, name)
    cache.batch_repeat_interleave(batch.group_size)

    if takes_positions:
        # Padding repeats the last position: counted on, it could leave the table of a model with learnt positions.
        where["position_ids"] = group(batch.prompt_mask.sum(1, keepdim=True)) + (
            batch.completion_attention.cumsum(1) - 1
        ).clamp(min=0)
        if own_positions:
            where["position_ids"] = where["position_ids"] + group(body.rope_deltas)
    hidden = body(
        input_ids=batch.completion_ids,
        attention_mask=torch.cat([group(batch.prompt_mask), batch.completion_attention], 1),
        use_cache=True,
        **{name: cache},
        **where,
        **{k: along_completions(k, v, batch) for k, v in along.items()},
    )[0]
    return torch.cat([group(prompt[0][:, -1:]), hidden], 1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradient; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class PrefixSharing:
    """Whether the prompts of a batch are run once for their groups, which saves work and is right for the model.

    It is not where there is nothing to share or little to save; for models that keep more than keys and values of the
    past (Mamba, linear attention) or take no cache; and while activation checkpointing is on, which rules the cache
    out. The first batch that could be shared is run both ways, in part: a model that disagrees with itself or fails is
    run on whole rows from then on, with one warning.

    Args:
        inner: the transformers model, without the wrappers of PEFT and the engine.
        body: its part below the head.
        enabled: False: never share.
    """

    def __init__(self, inner: nn.Module, body: nn.Module | None, *, enabled: bool = True):
        self._inner = inner
        self._possible = enabled and body is not None and _keeps_keys_and_values(inner, body)
        self._checked = False
        if body is not None:
            continue_from_last(body)

    def beside(self, inner: nn.Module, body: nn.Module) -> None:
        """Share where another model can that runs the same batches, and only there; arguments as of the class."""
        self._possible = self._possible and _keeps_keys_and_values(inner, body)
        continue_from_last(body)

    def applies(self, model: nn.Module, batch: GroupedBatch, figures: Figures) -> bool:
        """Whether to share this batch; every process of a sharded model has to ask, and gets the same answer.

        Args:
            model: the model as the engine wraps it.
            batch: rows, as they come from the collator.
            figures: runs a batch with a shared prefix (True) or on whole rows (False); gives what is to agree, of the
                same shape for both, and whether half precision took part.
        """
        if not self._possible:
            return False
        together = is_sharded(model)
        saved = _saved(batch)
        if saved > 0 and self._recomputes(model):
            saved = _CANNOT
        if together:  # a process that ran other layers than the rest would wait for them for ever
            saved = _sum(saved, batch)
        if saved <= 0:
            return False
        if not self._checked:
            self._checked = True
            reason = self._disagreement(model, batch, figures)
            if together and _sum(reason is not None, batch) and reason is None:
                reason = "it did so on another process"
            if reason is not None:
                self._possible = False
                logger.warning(
                    "%s cannot run a prompt once for its group of completions (%s): each completion runs its whole "
                    "row, which is right but slower.",
                    type(self._inner).__name__,
                    reason,
                )
        return self._possible

    def _recomputes(self, model: nn.Module) -> bool:
        """Whether layers are run again in the backward pass, which would add to the cache a second time."""
        if self._inner.training and any(getattr(m, "gradient_checkpointing", False) for m in self._inner.modules()):
            return True
        return torch.is_grad_enabled() and any(hasattr(m, "_checkpoint_wrapped_module") for m in model.modules())

    @staticmethod
    def _disagreement(model: nn.Module, batch: GroupedBatch, figures: Figures) -> str | None:
        sample = _sample(batch)
        with evaluating(model):
            expected, half = figures(sample, False)
            try:
                found, _ = figures(sample, True)
            except torch.OutOfMemoryError:
                raise
            except _MODEL_CANNOT as error:
                return f"{type(error).__name__}: {error}"
        apart = (found.float() - expected.float()).abs()
        # Rounding shifts single tokens by more in half precision than a real error shifts the mean.
        apart = apart if apart.numel() else apart.new_zeros(1)
        worst, bound = (apart.mean().item(), 0.1) if half else (apart.max().item(), 1e-3)
        return None if worst <= bound else f"its figures differ by {worst:.2g}"


def _keeps_keys_and_values(inner: nn.Module, body: nn.Module) -> bool:
    """Whether all that a model keeps of the past is a key/value cache, as far as class and configuration tell."""
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return _cache_name(body) is not None and not getattr(inner, "_is_stateful", False) and kinds <= _CACHED_LAYERS


def _cache_name(body: nn.Module) -> str | None:
    """The argument, and the output, that is the key/value cache; transformers has called it cache since 5.24."""
    takes = inspect.signature(body.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def _saved(batch: GroupedBatch) -> float:
    """The tokens that sharing saves, padding counted in, beyond the cost of a second run."""
    if batch.group_size == 1 or not batch.prompt_ids.shape[1] or not batch.completion_ids.shape[1]:
        return _CANNOT
    prompts, completions = batch.prompt_mask.sum(1), batch.completion_attention.sum(1)
    rows = prompts.repeat_interleave(batch.group_size) + completions
    row, prompt, completion = torch.stack([rows.max(), prompts.max(), completions.max()]).tolist()
    shared = len(prompts) * prompt + batch.rows * max(completion, 1)
    return _WORTH * batch.rows * row - shared if prompt else _CANNOT


def _sample(batch: GroupedBatch) -> GroupedBatch:
    """Two prompts with two completions each; the second prompt is cut, so that there is padding to get wrong.

    Images belong to prompts in a way that is not known here: with them, one completion of every prompt.
    """
    along, others = along_prompt(batch)
    if others:
        return batch.member(0)
    each = min(batch.group_size, 2)
    prompts = torch.tensor([0, min(1, batch.prompt_ids.shape[0] - 1)], device=batch.prompt_ids.device)
    rows = (prompts[:, None] * batch.group_size + torch.arange(each, device=prompts.device)).flatten()
    mask = batch.prompt_mask[prompts]
    mask[1] *= mask[1].cumsum(0) > mask[1].sum() // 2
    attention = batch.completion_attention[rows]
    return GroupedBatch(
        batch.prompt_ids[prompts],
        mask,
        batch.completion_ids[rows],
        attention,
        attention,
        {k: v[prompts] for k, v in along.items()},
        each,
        beyond=batch.beyond,
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model gathers parameters from other processes (ZeRO-3, FSDP)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return True
    return any(type(module).__name__.startswith(("FSDP", "FullySharded")) for module in model.modules())


def _sum(value: float, batch: GroupedBatch) -> float:
    total = torch.tensor(float(value), dtype=torch.float64, device=batch.completion_ids.device)
    torch.distributed.all_reduce(total)
    return total.item()
