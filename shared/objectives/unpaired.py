"""Losses of single completions that are desirable or not, one value a row; the loss of a batch is the mean over rows.

u = log π(y) - log ref(y) is a row's log-ratio, log-probabilities summed over the completion's tokens.

What is estimated over more than one row comes in as an argument: KTO's reference point z, BCO's shift δ, the
classifier of BCO's density ratio. `kl_sums`, `running_mean` and `fit_logistic` are the arithmetic of these; summing
over ranks is up to the caller.

Dimension letters: P rows, N rows of a sample, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kto(
    u_P: Tensor,
    desirable_P: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, `w_d (1 - σ(β(u - z)))` for desirable rows, `w_u (1 - σ(β(z - u)))` for the others.

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7, with the constant λ_y left out of `λ_y - v`.

    Args:
        u_P: `(P,)` log-ratios.
        desirable_P: `(P,)` bool.
        kl: z, a scalar, see `kl_estimate`. No gradient flows through it.
        beta: β.
        desirable_weight, undesirable_weight: w_d and w_u.

    Returns:
        `(P,)`.
    """
    z = kl.detach() if isinstance(kl, Tensor) else kl
    return _by_label(beta * (z - u_P), desirable_P, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    u_P: Tensor,
    desirable_P: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero on single rows, `w_d (1 - σ(βu))` for desirable rows, `w_u σ(βu)` for the others: KTO with z = 0.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7. Arguments and result as in `kto`.
    """
    return _by_label(-beta * u_P, desirable_P, desirable_weight, undesirable_weight)


def _by_label(x: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    desirable = desirable.bool()
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(x.dtype)
    return weight * torch.where(desirable, x, -x).sigmoid()


def bco(
    u_P: Tensor,
    desirable_P: Tensor,
    delta: Tensor | float,
    *,
    beta: float = 0.1,
    density_ratio_P: Tensor | None = None,
) -> Tensor:
    """BCO, `-ls(βu - δ)` for desirable rows, `-w ls(-(βu - δ))` for the others.

    Jung et al. 2024, arXiv:2404.04656.

    Args:
        u_P: `(P,)` log-ratios.
        desirable_P: `(P,)` bool.
        delta: δ, the running mean of the rewards βu of all rows, see `running_mean`. No gradient flows through it.
        beta: β.
        density_ratio_P: `(P,)` w, looked at where a row is undesirable, see `density_ratio`. None: 1.

    Returns:
        `(P,)`.
    """
    shift = delta.detach() if isinstance(delta, Tensor) else delta
    desirable = desirable_P.bool()
    logits = beta * u_P - shift
    loss = -F.logsigmoid(torch.where(desirable, logits, -logits))
    if density_ratio_P is None:
        return loss
    return loss * torch.where(desirable, 1.0, density_ratio_P.detach()).to(loss.dtype)


def kl_sums(policy_P: Tensor, reference_P: Tensor, counted_P: Tensor | None = None) -> Tensor:
    """What a set of rows adds to KTO's z: `(2,)`, the sum of their log-ratios and how many they are. No gradient.

    Args:
        policy_P, reference_P: `(P,)` summed log-probabilities of completions that answer another prompt.
        counted_P: `(P,)` bool, rows to be looked at; None: all.
    """
    ratios = (policy_P - reference_P).detach()
    counted = torch.ones_like(ratios, dtype=torch.bool) if counted_P is None else counted_P.bool()
    return torch.stack([ratios.masked_fill(~counted, 0).sum(), counted.sum().to(ratios.dtype)])


def kl_estimate(sums: Tensor) -> Tensor:
    """KTO's reference point z: the mean log-ratio, at least 0; 0 where nothing was counted.

    Args:
        sums: `(2,)` from `kl_sums`, added over whatever the mean is to run over (ranks, micro-batches).
    """
    return (sums[0] / sums[1].clamp_min(1)).clamp_min(0)


def running_mean(mean: Tensor, count: Tensor, added: Tensor, added_count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and count of a stream after another `added_count` values whose sum is `added`: BCO's δ. All scalars."""
    total = count + added_count
    return mean + (added - mean * added_count) / total.clamp_min(1), total


def density_ratio(desirable_probability: Tensor, *, minimum: float = 0.5, maximum: float = 10.0) -> Tensor:
    """BCO's underlying distribution matching: `p / (1 - p)`, clamped.

    How much likelier a prompt is among desirable rows than among undesirable ones, where p comes from a classifier
    that was fitted with both classes weighing the same (Jung et al. 2024, arXiv:2404.04656).

    Args:
        desirable_probability: p, any shape, see `desirable_probability`.
        minimum, maximum: bounds of the ratio.

    Raises:
        ValueError: the bounds are not 0 <= minimum <= maximum.
    """
    if not 0 <= minimum <= maximum:
        raise ValueError(
            f"The density ratio needs 0 <= minimum <= maximum, {minimum!r} and {maximum!r} were given "
            "(min_density_ratio, max_density_ratio)."
        )
    p = desirable_probability
    # p = 1 gives infinity, which the clamp takes to the maximum
    return (p / (1 - p)).clamp(minimum, maximum)


def desirable_probability(features_ND: Tensor, weight_D: Tensor, bias: Tensor) -> Tensor:
    """`σ(features @ weight + bias)`, `(N,)` float64, with the classifier of `fit_logistic`."""
    return (features_ND.to(weight_D) @ weight_D + bias).sigmoid()


def fit_logistic(features_ND: Tensor, labels_N: Tensor, *, l2: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic regression whose two classes weigh the same, however many rows each has.

    Minimises `l2/2 · |weight|² - Σ_n s_n ls(±(features_n · weight + bias))`, s_n = N / (2 · rows of n's class). The
    bias is not penalised. In float64, from zero, so that the same input gives the same classifier.

    Args:
        features_ND: `(N, D)`.
        labels_N: `(N,)` bool, True where the row is desirable.
        l2: strength of the penalty.

    Returns:
        weight `(D,)` and bias `()`, float64.

    Raises:
        ValueError: a class without rows, features that are not finite, or a negative penalty.
    """
    labels = labels_N.bool()
    features = features_ND.detach().double()
    positives, rows = int(labels.sum()), len(labels)
    if not 0 < positives < rows:
        raise ValueError(
            f"A classifier of desirable and undesirable rows needs both: {positives} of {rows} rows are desirable."
        )
    if not features.isfinite().all():
        raise ValueError("The features of a classifier must be finite numbers.")
    if l2 < 0:
        raise ValueError(f"The penalty l2 must not be negative, {l2!r} was given.")

    sign = 2 * labels.double() - 1
    scale = rows / (2 * torch.where(labels, positives, rows - positives).double())
    parameters = torch.zeros(features.shape[1] + 1, dtype=torch.float64, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weight, bias = parameters[:-1], parameters[-1]
        loss = 0.5 * l2 * weight.square().sum() - (scale * F.logsigmoid(sign * (features @ weight + bias))).sum()
        (parameters.grad,) = torch.autograd.grad(loss, parameters)
        return loss

    with torch.enable_grad():
        solver.step(closure)
    fitted = parameters.detach()
    return fitted[:-1], fitted[-1]
