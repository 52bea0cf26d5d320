"""Which rows of an optimizer step the student answers itself, and rows with answers put in their place.

A row is known by its place in the step, which does not depend on how the step is cut into micro-batches and processes:
so neither do who answers it and what numbers its answer is drawn with.

Dimension letters: T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.data.collators import SupervisedCollator
from shared.data.rows import PADDING
from shared.policies.base import GroupedBatch


def places_in_step(sizes: Sequence[int], process: int, processes: int) -> list[range]:
    """The places of one process's rows in the step, of each of its micro-batches.

    Args:
        sizes: the rows of each micro-batch, alike on every process.
    """
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    begin = [start * processes + process * size for start, size in zip(starts, sizes, strict=True)]
    return [range(first, first + size) for first, size in zip(begin, sizes, strict=True)]


def evenly_chosen(count: int, share: float, seeds: Sequence[int]) -> list[bool]:
    """Of so many places some, evenly spaced, each with a chance of `share`; more places do not change earlier ones."""
    start = np.random.default_rng(seeds).random()
    return [math.floor(share * (at + 1) + start) > math.floor(share * at + start) for at in range(count)]


def draws(*seeds: int) -> torch.Generator:
    """The random numbers that belong to some numbers (a run's seed, a step, a row's place in it)."""
    (state,) = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def last_prompt(ids: Tensor, learnt: Tensor, longest: int | None) -> Tensor:
    """What comes before the last answer of a row `(T,)`; all of it where there is none.

    Args:
        ids: tokens, without padding.
        learnt: `(T,)` bool.
        longest: a longer prompt loses its beginning.
    """
    end = len(ids)
    if learnt.any():
        end = int(learnt.nonzero()[-1])
        while end > 0 and learnt[end - 1]:
            end -= 1
    return ids[:end] if longest is None else ids[max(0, end - longest) : end]


def with_answers(
    batch: GroupedBatch, answers: dict[int, tuple[Tensor, Tensor]], collator: SupervisedCollator
) -> GroupedBatch:
    """The rows of a batch, some with another prompt and answer, of which the answer is learnt.

    Args:
        batch: whole rows, on the CPU.
        answers: number of the row -> prompt and answer, tokens `(n,)`.
        collator: pads.
    """
    if not answers:
        return batch
    rows = []
    for at, (ids, learnt) in enumerate(unpadded(batch)):
        if at in answers:
            prompt, answer = answers[at]
            ids = torch.cat([prompt, answer])
            learnt = torch.arange(len(ids)) >= len(prompt)
        counted = bool(batch.columns["counted"][at])
        rows.append({"input_ids": ids.numpy(), "learnt": learnt.numpy(), PADDING: not counted})
    made = collator(rows)
    made.notes = batch.notes
    return made


def unpadded(batch: GroupedBatch) -> list[tuple[Tensor, Tensor]]:
    """Tokens `(T,)` of each row of a batch of whole rows, and which of them are learnt."""
    lengths = batch.completion_attention.sum(1).tolist()
    rows = zip(batch.completion_ids, batch.completion_mask.bool(), lengths, strict=True)
    return [(ids[:length], learnt[:length]) for ids, learnt, length in rows]
