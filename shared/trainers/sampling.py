"""The order in which rows are drawn for training: the same rows a step, however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from shared.data.rows import PADDING
from shared.data.sampler import length_grouped_order


class Filled(Dataset):
    """Rows, and behind them marked ones that count nothing, so that the last step has a row for every process.

    accelerate would fill it up with rows of the beginning, and count those twice.

    Args:
        rows: map-style rows.
        multiple: rows of one batch, over all processes.
    """

    def __init__(self, rows: Any, multiple: int):
        self.rows, self.total = rows, -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Any]:
        last = len(self.rows) - 1
        return self.rows[index] if index <= last else {**self.rows[last], PADDING: True}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows, as torch's data loader asks for a batch."""
        real = [at for at in indices if at < len(self.rows)]
        if len(real) < len(indices) or not hasattr(self.rows, "__getitems__"):
            return [self[at] for at in indices]
        return self.rows.__getitems__(indices)


class TrainingOrder(Sampler[int]):
    """The rows of an epoch, an order that depends on seed and epoch alone; the marked rows of `Filled` come last.

    Args:
        rows: the rows as they are drawn from, with `lengths` `(N,)` where they are grouped by them.
        strategy: `random`, `sequential`, or `group_by_length`: rows of similar length in a batch, at random.
        batch_size: rows of one optimizer step, over all processes.
        seed: of the order.
    """

    def __init__(self, rows: Any, strategy: str, *, batch_size: int, seed: int):
        self.filled = len(rows)
        rows = rows.rows if isinstance(rows, Filled) else rows
        self.count, self.lengths = len(rows), getattr(rows, "lengths", None)
        self.strategy, self.batch_size, self.seed, self.epoch = strategy, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch, also when a run goes on from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.filled

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.strategy == "sequential":
            order = np.arange(self.count)
        elif self.strategy == "group_by_length" and self.lengths is not None:
            order = length_grouped_order(self.lengths, self.batch_size, seed=generator)
        else:
            order = generator.permutation(self.count)
        return iter([*order.tolist(), *range(self.count, self.filled)])
