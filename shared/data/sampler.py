"""The order in which rows are trained on."""

from __future__ import annotations

import numpy as np

BATCHES_TOGETHER = 50  # among so many batches' rows, like lengths are put together


def length_grouped_order(
    lengths: np.ndarray, batch_size: int, *, seed: int | np.random.Generator, batches_together: int = BATCHES_TOGETHER
) -> np.ndarray:
    """A random order `(N,)` in which the rows of a batch have similar lengths, so that little is padded.

    Rows are shuffled, sorted by length within large portions, cut into batches, and the batches shuffled. The batch
    with the longest row comes first: what does not fit into memory fails at once.

    Args:
        lengths: `(N,)` tokens of each row.
        batch_size: rows of a batch; with several processes, of all their batches together.
        seed: a seed (the run's, plus the epoch) or a numpy generator.
        batches_together: how many batches make a portion. More: less padding, less chance.
    """
    generator = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    shuffled = generator.permutation(len(lengths))
    portion = np.arange(len(lengths)) // (batch_size * batches_together)
    order = shuffled[np.lexsort((-lengths[shuffled], portion))]
    whole = len(order) // batch_size
    batches = order[: whole * batch_size].reshape(whole, batch_size)
    rest = order[whole * batch_size :]  # fewer than a batch: last, so that no other batch is cut
    if whole:
        batches = batches[generator.permutation(whole)]
        longest = int(lengths[batches].max(axis=1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.reshape(-1), rest])
