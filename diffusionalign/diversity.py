"""How unlike a model's samples are, against its start: what falls when a reward is over-optimised.

A model that has found one picture that pays draws it for every prompt and from any noise: the reward still rises while
the distance between its samples goes to zero. Deliberately not here: when that is alarming (shared.trainers.alarms).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 16  # pixels that an image is averaged to: what is compared is colour and layout, not noise
ROUNDS = 3  # of the start, whose mean is 1


def thumbnails(images: Tensor | Sequence[Tensor], side: int = SIDE) -> Tensor:
    """`(N, 3 * side * side)` float32: images `(3, H, W)` of any size, clamped to [0, 1] and averaged to small ones."""
    small = [
        functional.adaptive_avg_pool2d(image.detach().float().clamp(0, 1)[None], side).flatten(1) for image in images
    ]
    return torch.cat(small)


def mean_distance(thumbnails: Tensor) -> float:
    """Mean over all pairs of the root of the mean squared difference; NaN where there is no pair.

    Args:
        thumbnails: `(N, D)`.
    """
    if len(thumbnails) < 2:
        return math.nan
    return float(torch.pdist(thumbnails.float()).mean()) / math.sqrt(thumbnails.shape[1])


class Diversity:
    """Mean distance between the samples of a round, relative to that of the first rounds.

    Example:
        >>> diversity = Diversity()
        >>> diversity(torch.tensor([[0.0, 0.0], [1.0, 1.0]])), diversity(torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
        (1.0, 0.6666666666666666)
    """

    def __init__(self) -> None:
        self.start: list[float] = []

    def __call__(self, thumbnails: Tensor) -> float:
        """1: as at the start; 0: all samples are alike; NaN where there is no pair.

        Args:
            thumbnails: `(N, D)` those of a round, over all processes; see `thumbnails`.
        """
        distance = mean_distance(thumbnails)
        if math.isnan(distance):
            return distance
        if len(self.start) < ROUNDS:
            self.start.append(distance)
        usual = sum(self.start) / len(self.start)
        return distance / usual if usual > 0 else 1.0
