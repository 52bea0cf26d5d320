"""From per-token values to one number, with the denominator said aloud.

A mean over a micro-batch is the wrong loss as soon as gradients are accumulated or processes differ in their token
counts. So the caller passes the denominator of the whole optimizer step, counted over all micro-batches and ranks, and
the micro-batches' losses add up to the loss of one big batch. Nothing here communicates, and nothing undoes an engine
that averages gradients over W ranks: there the caller multiplies by W.

Dimension letters: B rows, T tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["token", "sequence", "sum", "fixed"]


def reduce_tokens(
    values_BT: Tensor, mask_BT: Tensor, *, mode: Reduction, denominator: Tensor | float | None = None
) -> Tensor:
    """Scalar reduction of `values` v over the places where `mask` m is 1; values elsewhere are not looked at.

    With D the denominator:

    - token: `sum(m * v) / D`. D defaults to the tensor's counted tokens.
    - sequence: `sum over rows of (row's sum(m * v) / row's sum(m)) / D`. D defaults to the rows that count a token.
    - sum: `sum(m * v)`. Takes no D.
    - fixed: `sum(m * v) / D`. D must be given (Dr. GRPO: rows times the longest completion allowed).

    A row without a counted token adds nothing; with none in the whole tensor the result is 0.

    Args:
        values_BT: `(B, T)`.
        mask_BT: `(B, T)`, 1 or True where the value counts.
        mode: one of the four.
        denominator: D, of the whole optimizer step.

    Raises:
        ValueError: an unknown mode, or a denominator that is missing, not positive or not to be given.
    """
    weights = token_weights(mask_BT, mode=mode, denominator=denominator).to(values_BT.dtype)
    return (weights * values_BT.masked_fill(~mask_BT.bool(), 0)).sum()


def token_weights(mask_BT: Tensor, *, mode: Reduction, denominator: Tensor | float | None = None) -> Tensor:
    """Weights `(B, T)`, float32, such that `sum(weights * values)` is `reduce_tokens(values, mask, …)`.

    For a loss that is summed chunk by chunk, and for one that is known only token by token.

    Args:
        mask_BT, mode, denominator: see `reduce_tokens`.

    Raises:
        ValueError: see `reduce_tokens`.
    """
    if mode not in get_args(Reduction):
        raise ValueError(f"Unknown reduction {mode!r}: choose one of {', '.join(get_args(Reduction))}.")
    if mode == "sum" and denominator is not None:
        raise ValueError(f"The reduction 'sum' takes no denominator, {denominator!r} was given: choose 'fixed'.")
    if mode == "fixed" and denominator is None:
        raise ValueError("The reduction 'fixed' needs a denominator.")
    if isinstance(denominator, int | float) and denominator <= 0:
        raise ValueError(f"The denominator of a reduction must be positive, {denominator!r} was given.")

    weights = mask_BT.bool().float()
    if mode == "sum":
        return weights
    row_counts = weights.sum(1, keepdim=True)
    if mode == "sequence":
        weights = weights / row_counts.clamp_min(1)
    if denominator is None:
        denominator = (row_counts > 0).sum() if mode == "sequence" else row_counts.sum()
    # A step that counts no token at all has a denominator of 0, and weights of 0: not 0 / 0.
    divisor = torch.as_tensor(denominator, dtype=weights.dtype, device=weights.device)
    return weights / torch.where(divisor > 0, divisor, 1.0)
