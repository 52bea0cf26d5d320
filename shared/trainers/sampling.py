"""The order in which rows are drawn for training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from shared.data.sampler import length_grouped_order


class LengthGrouped(Sampler[int]):
    """Batches of rows of similar length, in random order; the order of an epoch depends on seed and epoch alone.

    Args:
        lengths: `(N,)` tokens of each row.
        batch_size: rows of one optimizer step, over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch, also when a run goes on from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        return iter(length_grouped_order(self.lengths, self.batch_size, seed=generator).tolist())
