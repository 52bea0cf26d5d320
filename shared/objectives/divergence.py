"""Divergences between policy and reference: the maps that f-DPO puts in the place of a log-ratio.

Each map is f'(t) at t = π/π_ref, written in u = log t: it rises with u and is 0 at u = 0. Exponents above `CAP`
continue as a straight line: the value and its square stay finite, and a completion that has drifted far still gets a
gradient that pulls it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

CAP = 30.0

Divergence = Callable[[Tensor], Tensor]


def capped_expm1(x: Tensor) -> Tensor:
    """`e^x - 1`, which from x = `CAP` on continues along its tangent.

    Args:
        x: any shape.

    Returns:
        The same shape; finite, with a finite gradient, for every finite x.
    """
    tangent = math.exp(CAP) * (1 + x - CAP) - 1
    return torch.where(x < CAP, torch.expm1(x.clamp(max=CAP)), tangent)


def reverse_kl(u: Tensor) -> Tensor:
    """The log-ratio itself, `u`: standard DPO."""
    return u


def forward_kl(u: Tensor) -> Tensor:
    """`1 - e^(-u)` (Wang et al. 2023, arXiv:2309.16240)."""
    return -capped_expm1(-u)


def js_divergence(u: Tensor) -> Tensor:
    """Jensen-Shannon, `log 2 + log σ(u)` (Wang et al. 2023, arXiv:2309.16240)."""
    return math.log(2) + F.logsigmoid(u)


def alpha_divergence(u: Tensor, *, alpha: float) -> Tensor:
    """`(e^((α-1)u) - 1) / (α - 1)`, and its limit u at α = 1 (Wang et al. 2023, arXiv:2309.16240).

    α = 0 is the forward KL divergence.

    Args:
        u: any shape, log-ratios.
        alpha: α.
    """
    if abs(alpha - 1) < 1e-6:
        return u
    return capped_expm1((alpha - 1) * u) / (alpha - 1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def divergence(name: str, *, alpha: float = 0.5) -> Divergence:
    """The map of that name, from log-ratios to scores of the same shape.

    Args:
        name: a key of `DIVERGENCES`.
        alpha: α of "alpha_divergence"; the others do not look at it.

    Raises:
        ValueError: no divergence has that name, or α is not a finite number.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}.")
    if name != "alpha_divergence":
        return DIVERGENCES[name]
    if not math.isfinite(alpha):
        raise ValueError(f"The α of alpha_divergence must be a finite number, {alpha!r} was given.")
    return partial(alpha_divergence, alpha=alpha)
