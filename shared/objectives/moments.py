"""Mean and deviation of values that several processes hold: sums that add up, whitening, and a running estimate.

A process works out `moment_sums` of its own values, the caller adds these over processes (a tensor of three numbers),
and everything else is computed from the total: with one process or with many the result is the same. Standard
deviations are the unbiased ones (divided by n - 1). Nothing here communicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def moment_sums(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """`[n, Σ v, Σ v²]` of the counted values, `(3,)` float64, without gradient; to be added over processes.

    Args:
        values: any shape; NaN is not counted.
        mask: the same shape, 1 where a value counts; None: everywhere.
    """
    values = values.detach()
    counted = ~values.isnan() if mask is None else mask.bool() & ~values.isnan()
    kept = values.double().masked_fill(~counted, 0)
    return torch.stack([counted.sum().double(), kept.sum(), kept.square().sum()])


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, both `()` float64; the variance of fewer than two values is 0.

    Args:
        sums: `(3,)` from `moment_sums`.
    """
    count, total, squares = sums.unbind()
    mean = total / count.clamp_min(1)
    return mean, (squares - total * mean).clamp_min(0) / (count - 1).clamp_min(1)


def whiten(
    values: Tensor, mask: Tensor, sums: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """`(v - mean) / √(variance + eps)` over the counted values; without shift_mean the mean is added again.

    Args:
        values: any shape.
        mask: the same shape, 1 where a value counts.
        sums: `moment_sums` of the values of all processes; None: of those given here.
        shift_mean: False scales only, as rewards need whose sign means something.
        eps: what keeps the division from blowing up.

    Returns:
        The same shape and type; 0 where the mask is 0: what stands there is not looked at.
    """
    counted = mask.bool()
    mean, variance = mean_and_variance(moment_sums(values, counted) if sums is None else sums.to(values.device))
    whitened = (values.masked_fill(~counted, 0).double() - mean) * (variance + eps).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~counted, 0).to(values.dtype)


@dataclass
class RunningMoments:
    """Mean and deviation of all values seen so far, batch by batch (Welford 1962; merged as by Chan et al. 1979).

    Args:
        count: values seen. `RunningMoments(**dataclasses.asdict(moments))` is the same estimate.
        mean: their mean.
        squares: the sum of their squared distances from it.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, sums: Tensor) -> None:
        """Take in a batch.

        Args:
            sums: `(3,)`, `moment_sums` of the batch, added over processes.

        Raises:
            ValueError: sums that are not finite, as an infinite value makes them.
        """
        count, total, squares = sums.tolist()
        if not math.isfinite(squares):
            raise ValueError("A running mean takes finite values alone: an infinite one was given.")
        if count == 0:
            return
        mean = total / count
        distance, seen = mean - self.mean, self.count + count
        self.squares += max(squares - total * mean, 0.0) + distance**2 * self.count * count / seen
        self.mean += distance * count / seen
        self.count = seen

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 of fewer than two values."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
