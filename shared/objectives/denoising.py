"""Objectives of denoisers on clean samples: what a prediction misses, and DiffusionNFT's update by rewards.

A level has α and σ: the noisy sample is `x = α x₀ + σ ε`. What a denoiser gives is one of

    epsilon       ε
    v_prediction  α ε - σ x₀
    sample        x₀
    flow          ε - x₀        (α + σ = 1: the velocity from data to noise)

Errors are means over a sample's elements, so that they do not grow with its size. Nothing here runs a model, draws
noise or knows a scheduler.

Dimension letters: N samples; dots stand for a sample's own dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v_prediction": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "sample": lambda clean, noise, alpha, sigma: clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
}
LEAST_WEIGHT = 1e-5  # of the adaptive weights of `nft_losses`


def denoising_target(prediction: str, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a denoiser of that kind should have given, `(N, …)`.

    Args:
        prediction: epsilon, v_prediction, sample or flow.
        clean, noise: `(N, …)`.
        alpha, sigma: `(N,)`.

    Raises:
        ValueError: another kind.
    """
    if prediction not in _TARGETS:
        raise ValueError(f"Unknown prediction {prediction!r}: a denoiser gives one of {', '.join(_TARGETS)}.")
    return _TARGETS[prediction](clean, noise, _beside(alpha, clean), _beside(sigma, clean))


def mean_squared_error(given: Tensor, target: Tensor) -> Tensor:
    """Mean over each sample's elements of `(given - target)²`, float32, `(N,)`."""
    return (given.float() - target.float()).square().flatten(1).mean(1)


def denoising_log_probs(given: Tensor, target: Tensor) -> Tensor:
    """`-½ e`, e the mean squared error: what stands for a picture's log-probability in Diffusion-DPO, `(N,)`.

    With it `-log σ(β(u - v))` of shared.objectives.pair_losses is the paper's `-log σ(-½β[(e_w - e_w^ref) - (e_l -
    e_l^ref)])`: up to a constant and to the number of elements, which go into β, it is a denoising step's Gaussian
    log-density (Wallace et al. 2023, arXiv:2311.12908).

    Args:
        given: `(N, …)` the denoiser's prediction.
        target: `(N, …)` see denoising_target; rows of one pair have the same level and noise.
    """
    return -0.5 * mean_squared_error(given, target)


def optimality(advantage: Tensor, max_advantage: float) -> Tensor:
    """`r = clip(A / 2A_max + ½, 0, 1)`: how far a sample counts as a good one (DiffusionNFT). `(N,)`.

    Args:
        advantage: A, `(N,)`.
        max_advantage: A_max.

    Raises:
        ValueError: A_max is not positive.
    """
    if not max_advantage > 0:
        raise ValueError(f"max_advantage must be a positive number, {max_advantage!r} was given.")
    return (advantage / (2 * max_advantage) + 0.5).clamp(0, 1)


def nft_losses(
    estimate: Tensor,
    old_estimate: Tensor,
    clean: Tensor,
    good: Tensor,
    *,
    beta: float = 1.0,
    max_advantage: float = 5.0,
) -> Tensor:
    """DiffusionNFT, `A_max/β · [r ‖x̂₀⁺ - x₀‖²/w⁺ + (1-r) ‖x̂₀⁻ - x₀‖²/w⁻]`, without its term to a reference. `(N,)`.

    `x̂₀⁺ = β x̂₀ + (1-β) x̂₀_old` and `x̂₀⁻ = (1+β) x̂₀_old - β x̂₀` are the positive and the implicit negative policy;
    `w = mean|x̂₀ - x₀|`, without gradient, makes levels of noise weigh alike (Zheng et al. 2025,
    arXiv:2509.16117). Clean samples are all that it needs of a rollout, whatever solver made them. x̂₀ is linear in
    what a denoiser gives, so that mixing estimates is mixing predictions, of every kind.

    Args:
        estimate: `(N, …)` x̂₀ under the policy.
        old_estimate: `(N, …)` under the policy that samples, without gradient.
        clean: `(N, …)` the samples x₀.
        good: r, `(N,)`; see optimality.
        beta: β, how far the policy is moved in each direction.
        max_advantage: A_max.

    Raises:
        ValueError: β or A_max is not positive.
    """
    for name, value in (("beta", beta), ("max_advantage", max_advantage)):
        if not value > 0:
            raise ValueError(f"{name} must be a positive number, {value!r} was given.")
    estimate, old, clean = estimate.float(), old_estimate.detach().float(), clean.float()
    positive = beta * estimate + (1 - beta) * old
    negative = (1 + beta) * old - beta * estimate
    good = good.float()
    losses = good * _weighted_error(positive, clean) + (1 - good) * _weighted_error(negative, clean)
    return losses * (max_advantage / beta)


def _weighted_error(estimate: Tensor, clean: Tensor) -> Tensor:
    with torch.no_grad():
        weight = (estimate - clean).abs().flatten(1).mean(1).clamp_min(LEAST_WEIGHT)
    return mean_squared_error(estimate, clean) / weight


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """`(N,)` as `(N, 1, …)`, to go with `(N, …)`."""
    return values.view(-1, *[1] * (like.dim() - 1))
