"""Policy terms of policy-gradient losses and estimates of the KL divergence, each a function with one value an action.

With w the importance ratio of an action or of its row, A the advantage, logp the log-probability of the action and sg
a stop to the gradient. What w is made of and how the values are reduced: `policy_gradient`.

Log-ratios are held within ±20 before they are exponentiated. Beyond that a ratio says that the numbers are broken
rather than how far to go, and its gradient is 0. k3's exponential goes on as a straight line (`capped_expm1`).

Every term is homogeneous in A: a factor on it that is at least 0 may be given as a factor on the advantage.

Dimension letters: B rows, T actions (tokens, denoising steps), N actions without a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shared.objectives.divergence import capped_expm1

MAX_LOG_RATIO = 20.0


def clipped(
    log_weight: Tensor,
    logp: Tensor,
    advantage: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """`-min(min(w, δ) A, clip(w, 1-ε, 1+ε_h) A)` (PPO: Schulman et al. 2017, arXiv:1707.06347).

    ε_h > ε is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476). δ bounds the ratio where A < 0, which PPO leaves
    open (INTELLECT-2, arXiv:2505.07291).

    Args:
        log_weight: log w, `(B, T)`, `(B, 1)` or `(N,)`.
        logp: not looked at.
        advantage: A, of a shape that goes with log_weight's.
        epsilon: ε.
        epsilon_high: ε_h; None: ε.
        delta: δ, above 1; None: no bound.

    Returns:
        The shape of log_weight and advantage together.
    """
    ratio = capped_exp(log_weight)
    bounded = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantage, bounded * advantage)


def cispo(log_weight: Tensor, logp: Tensor, advantage: Tensor, *, epsilon_high: float | None = None) -> Tensor:
    """`-sg[min(w, ε_h)] A logp`: the weight is truncated, no action's gradient is (MiniMax-M1, arXiv:2506.13585).

    ε_h is the largest weight itself; None: 5 (ScaleRL: Khatri et al. 2025, arXiv:2510.13786). Other arguments as in
    `clipped`; logp has the shape of the advantage.
    """
    return -truncated_ratio(log_weight, epsilon_high) * advantage * logp


def truncated_ratio(log_weight: Tensor, epsilon_high: float | None) -> Tensor:
    """`sg[min(w, ε_h)]`, the weight of `cispo`."""
    return capped_exp(log_weight.detach()).clamp(max=5.0 if epsilon_high is None else epsilon_high)


def sapo(
    log_weight: Tensor,
    logp: Tensor,
    advantage: Tensor,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tensor:
    """`-(4/τ) σ(τ(w-1)) A`, a soft gate in the place of clipping; τ goes by the sign of A (arXiv:2511.20347).

    Arguments as in `clipped`.
    """
    tau = torch.where(advantage > 0, sapo_temperature_pos, sapo_temperature_neg).to(log_weight.dtype)
    return -(4 / tau) * (tau * (capped_exp(log_weight) - 1)).sigmoid() * advantage


def vespo(
    log_weight: Tensor,
    logp: Tensor,
    advantage: Tensor,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Tensor:
    """`-sg[φ] A logp` with `φ = e^(λ + kS - λe^S)`, which is 1 where nothing has changed (arXiv:2602.10693).

    Args:
        log_weight: S, the row's summed log-ratio, held within [ln 1e-8, 20].
        logp, advantage: as in `cispo`.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and λ by the sign of A; k pulls down rows that
            have become less likely, λ those that have become more likely.
    """
    phi = gamma_weight(
        log_weight,
        advantage,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    return -phi * advantage * logp


def gamma_weight(
    log_weight: Tensor,
    advantage: Tensor,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Tensor:
    """φ of `vespo`, without gradient. Arguments as there."""
    log_weight = log_weight.detach().clamp(math.log(1e-8), MAX_LOG_RATIO)
    k = torch.where(advantage >= 0, vespo_k_pos, vespo_k_neg).to(log_weight.dtype)
    rate = torch.where(advantage >= 0, vespo_lambda_pos, vespo_lambda_neg).to(log_weight.dtype)
    return (rate + k * log_weight - rate * log_weight.exp()).exp()


def capped_exp(log_ratio: Tensor) -> Tensor:
    """`e^x` with x held within ±`MAX_LOG_RATIO`; gradient 0 beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class Loss(NamedTuple):
    """A policy term, and how its values are reduced (see `PolicyGradient.weights`)."""

    term: Callable[..., Tensor]
    reduction: str


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped, "row mean"),
    "bnpo": Loss(clipped, "action"),
    "dr_grpo": Loss(clipped, "fixed"),
    "dapo": Loss(clipped, "action"),
    "cispo": Loss(cispo, "action"),
    "sapo": Loss(sapo, "row mean"),
    "luspo": Loss(clipped, "row sum"),
    "vespo": Loss(vespo, "action"),
}

# Schulman 2020, "Approximating KL divergence", of the policy to the reference, with x = ref - logp.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: -x,
    "k2": lambda x: 0.5 * x.square(),
    "k3": lambda x: capped_expm1(x) - x,
}
