"""How far a policy may go from its reference: the penalty of each token, and the rules that set its weight.

The penalty enters the reward and so has no gradient. The controllers are plain numbers that a trainer saves with its
state and steps once a rollout. Penalties with a gradient, in the loss: `policy_gradient`.

Dimension letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shared.objectives.distillation import kl_divergence
from shared.objectives.pair_losses import known
from shared.objectives.policy_losses import KL_ESTIMATORS

# Schulman 2020, "Approximating KL divergence", where the penalty is an estimate of it
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda logp, ref: KL_ESTIMATORS["k1"](ref - logp),
    "abs": lambda logp, ref: (logp - ref).abs(),
    "mse": lambda logp, ref: KL_ESTIMATORS["k2"](ref - logp),
    "k3": lambda logp, ref: KL_ESTIMATORS["k3"](ref - logp),
    "full": kl_divergence,
}


@torch.no_grad()
def kl_penalty(logp: Tensor, ref: Tensor, *, kind: str = "kl") -> Tensor:
    """What is held against each token for leaving the reference, without gradient.

    - kl: `logp - ref` (Ziegler et al. 2019, arXiv:1909.08593); below 0 where the reference finds a token likelier.
    - abs: `|logp - ref|`. mse: `½ (logp - ref)²`. k3: `e^x - x - 1` with x = ref - logp. Never negative.
    - full: the divergence itself, `Σ_v π(v) (log π(v) - log ref(v))`.

    Args:
        logp, ref: `(…)`, of the chosen tokens; for "full" `(…, V)`, of every token. From hidden states, in bounded
            memory, "full" is `distillation.head_jsd(policy, reference, beta=1)`.
        kind: one of `PENALTIES`.

    Returns:
        `(…)`.

    Raises:
        ValueError: an unknown kind.
    """
    return PENALTIES[known(kind, PENALTIES, "KL penalty")](logp, ref)


class KLController(Protocol):
    """What sets the weight of the penalty: `coefficient`, and a step after each rollout."""

    coefficient: float

    def step(self, kl: float, rows: int) -> None: ...


@dataclass
class FixedKL:
    """A coefficient that stays as it is.

    Args:
        coefficient: weight of the penalty, at least 0.

    Raises:
        ValueError: a negative coefficient.
    """

    coefficient: float = 0.2

    def __post_init__(self):
        _check_coefficient(self.coefficient)

    def step(self, kl: float, rows: int) -> None:
        """Nothing is changed."""


@dataclass
class AdaptiveKL:
    """A coefficient that goes up where the divergence is above its target and down where it is below.

    `coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) · rows / horizon` (Ziegler et al. 2019, arXiv:1909.08593).

    Args:
        coefficient: the first weight of the penalty, and then that of now: all the state that there is.
        target: divergence of a whole row, in nats, that is aimed at.
        horizon: rows over which a coefficient that is off by 20 % or more is changed by some 20 %.

    Raises:
        ValueError: a negative coefficient, or a target or horizon that is not positive.
    """

    coefficient: float = 0.2
    target: float = 6.0
    horizon: float = 10000.0

    def __post_init__(self):
        _check_coefficient(self.coefficient)
        for name in ("target", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, {getattr(self, name)!r} was given.")

    def step(self, kl: float, rows: int) -> None:
        """Set the coefficient for the next rollout.

        Args:
            kl: mean over rows of the summed `logp - ref` of a row, whatever the kind of the penalty.
            rows: rows of the rollout, of all processes.

        Raises:
            ValueError: kl is no number, or the rows are so many that the coefficient could turn negative.
        """
        if math.isnan(kl):
            raise ValueError("The KL divergence of a rollout is not a number: the coefficient cannot follow it.")
        if rows >= 5 * self.horizon:
            raise ValueError(f"A horizon of {self.horizon} is too short for rollouts of {rows} rows: take {rows} up.")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * rows / self.horizon


def _check_coefficient(value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"A KL coefficient must be a number of at least 0, {value!r} was given.")


def stops_early(policy_kl: float, target: float | None, *, factor: float = 1.5) -> bool:
    """Whether an update has moved the policy so far that the rest of its epochs is better left out.

    True where the divergence from the policy that sampled is above `factor · target`, or is no number.

    Args:
        policy_kl: mean over actions of `old - logp`, over all processes: they must all decide alike.
        target: None: never.
        factor: how much over the target is let pass.

    Raises:
        ValueError: the target is not positive.
    """
    return target is not None and not policy_kl <= factor * _positive(target, "target")


def skips_batch(mean_ratio: float, threshold: float | None) -> bool:
    """Whether a batch is to be left out since its ratios say that it has gone wrong.

    True where the mean of π/π_old over the batch's actions is above the threshold, or is no number.

    Args:
        mean_ratio: over all processes: they must all decide alike.
        threshold: None: never.

    Raises:
        ValueError: the threshold is not positive.
    """
    return threshold is not None and not mean_ratio <= _positive(threshold, "threshold")


def _positive(value: float, name: str) -> float:
    if not value > 0:
        raise ValueError(f"The {name} must be a positive number, {value!r} was given.")
    return value
