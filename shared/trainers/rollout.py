"""What an online trainer holds between sampling and its updates: rollouts, the buffer of micro-batches, the prompts.

An action is a token or a denoising step: nothing here knows which. Sampling, and turning rows into what a policy runs
on, is a modality's own, behind `Actor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.data.rows import ROW
from shared.data.schema import undecoded
from shared.errors import DataError, UserError
from shared.policies.base import ActionBatch
from shared.rewards.base import Sample
from shared.trainers.sampling import TrainingOrder


@dataclass
class Rollout:
    """What one process sampled: B rows, prompt by prompt, `group_size` rows of each prompt in a row.

    Args:
        samples: B, for the rewards.
        group_size: rows of one prompt that stand together here; a divisor of the trainer's num_generations.
        actions: the modality's own record of what was done.
        lengths: `(B,)` actions of each row.
        truncated: `(B,)` bool, rows that were cut at their longest.
        logp: a tensor `(lengths[i],)` a row, log-probability of each action when it was sampled; None: not known.
        rewards: `(B, K)` NaN where a reward does not apply.
        total: `(B,)` the rewards put together, NaN where none applies.
        advantages: `(B,)`.
        old, ref: as `logp`, under the policy before its update and under the reference; an entry None: not known.
        correction: `(lengths[i],)` a row, weights that correct for a sampler with other numerics.
        columns: what else a trainer holds of its round, by name: a number `()` a row, or as `logp`.
        extras: column -> B values, that rewards gave to `log_extra`, for people; not kept in checkpoints.
    """

    samples: list[Sample]
    group_size: int
    actions: Any
    lengths: Tensor
    truncated: Tensor
    logp: list[Tensor] | None = None
    rewards: Tensor | None = None
    total: Tensor | None = None
    advantages: Tensor | None = None
    old: list[Tensor | None] = field(default_factory=list)
    ref: list[Tensor | None] = field(default_factory=list)
    correction: list[Tensor] | None = None
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.samples)


class Actor(Protocol):
    """A modality's side of an online trainer."""

    exact: bool  # the log-probabilities of its samples are in the trainer's own numerics
    unit: str  # what an action is: `token` or `step`
    makes_images: bool  # a sample's output is an image tensor `(3, H, W)` in [0, 1]

    def act(
        self,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        group_size: int,
        *,
        random: torch.Generator | None,
        mode: str = "train",
    ) -> Rollout:
        """Sample `group_size` times for each of the rows' prompts. `mode`: train, eval or greedy."""
        ...

    def check(self, row: dict[str, Any]) -> str | None:
        """What happens to a row's prompt that its user should know, such as a cut; None: nothing.

        Raises:
            DataError: the row cannot be sampled from.
        """
        ...

    def batch(
        self, rollout: Rollout, rows: Sequence[int], group_size: int, *, skipped: Tensor | None = None
    ) -> ActionBatch:
        """What the policy runs on: some rows, of which `group_size` in a row belong to one prompt.

        Args:
            rollout: what the rows are of.
            rows: which.
            group_size: a divisor of the rollout's own.
            skipped: `(B,)` bool over all rows of the rollout, those of which no action counts.
        """
        ...

    def join(self, parts: Sequence[Rollout], rows: Sequence[Sequence[int]]) -> Rollout:
        """One rollout of some rows of several."""
        ...

    def state(self, rollout: Rollout) -> dict[str, Any]:
        """The actions as plain data and tensors, for a checkpoint."""
        ...

    def restored(self, state: dict[str, Any], rows: Sequence[dict[str, Any]], group_size: int) -> Rollout:
        """The rollout that `state` was made of, over the same prompts' rows."""
        ...

    def refresh(self, trainer: Any) -> None:
        """Called before each sampling: what samples is to be the trainer's model as it is now."""
        ...

    def question(self, row: dict[str, Any]) -> tuple[list[Any], str]:
        """Images and prompt of a row, for the report."""
        ...

    def shown(self, sample: Sample) -> tuple[list[Any], str, str]:
        """Images, prompt and output of a sample, for the report; an output that is an image is an empty text."""
        ...


@dataclass
class MicroBatch:
    """One micro-batch of an update.

    Args:
        batch: what the policy runs on; its columns hold what the objective needs.
        rollout: what it is a part of; the trainer's buffer may hold a later one by the time it is trained on.
        rows: the rows of the rollout that `batch` holds.
        counts: rows and actions that the reduction counts, also those of rows that were left out of `batch`.
        on_policy: whether the policy is still the one that sampled.
    """

    batch: Any
    rollout: Rollout
    rows: list[int]
    counts: tuple[int, int]
    on_policy: bool


@dataclass
class Buffer:
    """A rollout cut into micro-batches, which are gone through `iterations` times.

    Args:
        rollout: the samples.
        cut: the rows of each micro-batch.
        iterations: μ.
        born: the optimizer step before which it was sampled.
        cursor: micro-batches that were handed out.
    """

    rollout: Rollout
    cut: list[list[int]]
    iterations: int
    born: int
    cursor: int = 0

    @property
    def spent(self) -> bool:
        """Whether all of it has been handed out."""
        return self.cursor >= len(self.cut) * self.iterations

    def next(self) -> list[int]:
        """The rows of the next micro-batch."""
        rows = self.cut[self.cursor % len(self.cut)]
        self.cursor += 1
        return rows


def cut(lengths: Tensor, unit: int, per_batch: int, window: int) -> list[list[int]]:
    """Rows of a rollout in micro-batches, units of rows kept together.

    Micro-batches of one optimizer step hold rows of similar length: that saves padding, and the step's gradient does
    not depend on how its rows are cut.

    Args:
        lengths: `(B,)`.
        unit: rows that belong together: those of one prompt.
        per_batch: rows of a micro-batch, a multiple of `unit`.
        window: micro-batches of one optimizer step; 1: rows stay in order.
    """
    units = [list(range(at, at + unit)) for at in range(0, len(lengths), unit)]
    longest = [int(lengths[each].max()) for each in units]
    size, span = per_batch // unit, window * per_batch // unit
    order = []
    for start in range(0, len(units), span):
        part = list(range(start, min(start + span, len(units))))
        order += sorted(part, key=lambda at: longest[at]) if window > 1 else part
    return [[row for at in order[i : i + size] for row in units[at]] for i in range(0, len(order), size)]


def joined_extras(parts: Sequence[Rollout], rows: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """The `extras` of some rows of several rollouts; None where a rollout has no such column."""
    names = dict.fromkeys(name for part in parts for name in part.extras)
    places = [(part, row) for part, kept in zip(parts, rows, strict=True) for row in kept]
    return {name: [part.extras[name][row] if name in part.extras else None for part, row in places] for name in names}


def padded(values: Sequence[Tensor], width: int) -> Tensor:
    """Rows of different length as `(B, width)` float32, zeros behind them."""
    out = torch.zeros(len(values), width)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out


def round_shape(args: Any, world: int) -> tuple[int, int, int]:
    """Rows of one round of sampling on a process, how many of a prompt stand together there, and in a micro-batch.

    Raises:
        UserError: the round does not divide into groups, on each process where dynamic sampling needs them whole.
    """
    size, groups = args.per_device_train_batch_size, args.num_generations
    local = size * args.steps_per_generation
    if groups < (least := getattr(args, "least_generations", 2)):
        why = ", since the rewards of a group are compared" if least > 1 else ""
        raise UserError(f"num_generations {groups}: must be at least {least}{why}.")
    if local * world % groups:
        raise UserError(
            f"A round of sampling has per_device_train_batch_size {size} × steps_per_generation "
            f"{args.steps_per_generation} × {world} process(es) = {local * world} samples, which do not divide into "
            f"groups of num_generations {groups}. Give numbers whose product is a multiple of {groups}."
        )
    if args.dynamic_sampling and local % groups:
        raise UserError(
            f"dynamic_sampling needs whole groups on each process: per_device_train_batch_size × "
            f"steps_per_generation = {local} must be a multiple of num_generations {groups}."
        )
    together = math.gcd(local, groups)
    return local, together, math.gcd(size, together)


class Prompts:
    """The training prompts in the order of the run, epoch after epoch, alike on every process.

    Args:
        rows: map-style rows.
        shuffle: in random order, another one each epoch.
        seed: of the order.
        check: says what happens to a row's prompt, and raises DataError where it cannot be used; see Actor.check.
        skip: put the row behind it in the place of one that cannot be used; else its DataError ends the run.

    Attributes:
        cursor: prompts drawn so far.
        notes: row number -> what happened to its prompt, of rows that were left out or changed.
    """

    def __init__(
        self,
        rows: Any,
        *,
        shuffle: bool,
        seed: int,
        check: Callable[[dict[str, Any]], str | None] | None = None,
        skip: bool = False,
    ):
        self.rows, self.cursor = rows, 0
        self.notes: dict[int, str] = {}
        self._check, self._skip, self._unusable = check, skip, set()
        self._order = TrainingOrder(rows, "random" if shuffle else "sequential", batch_size=1, seed=seed)
        self._epoch, self._indices = -1, []

    def draw(self, count: int) -> list[int]:
        """The indices of the next prompts."""
        drawn = []
        for at in range(self.cursor, self.cursor + count):
            epoch, place = divmod(at, len(self.rows))
            if epoch != self._epoch:
                self._order.set_epoch(epoch)
                self._epoch, self._indices = epoch, list(self._order)
            drawn.append(self._indices[place])
        self.cursor += count
        return drawn

    def at(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows at some indices; each is read once.

        Raises:
            DataError: a row that cannot be used, or with `skip` that none can.
        """
        indices = list(indices)
        found = {at: self._usable(at) for at in dict.fromkeys(indices)}
        return [found[at] for at in indices]

    def _usable(self, at: int) -> dict[str, Any]:
        """The row there or, where it is left out, the first behind it that is not: alike on all processes."""
        count = len(self.rows)
        for place in (each % count for each in range(at, at + count)):
            if place in self._unusable:
                continue
            row = self.rows[place]
            try:
                note = self._check(row) if self._check else None
            except DataError as error:
                if not self._skip:
                    raise
                self._unusable.add(place)
                number = row.get(ROW, place)
                self.notes[number] = f"left out: {str(error).removeprefix(f'row {number}: ')}"
                continue
            if note:
                self.notes[row.get(ROW, place)] = note
            return row
        raise DataError(f"No row can be used; the last: {next(reversed(self.notes.values()))}")


def in_memory(rows: Any, needed: int | None) -> Any:
    """A data set that can be drawn from at random; of a stream, as many rows as the run can draw.

    Raises:
        UserError: a stream, and a run that does not say how long it is.
    """
    if rows is None or hasattr(rows, "__len__"):
        return rows
    if needed is None:
        raise UserError("max_steps is missing: a stream does not say how many rows it has, so give the steps.")
    return list(islice(undecoded(rows), needed))


def row_number(sample: Sample) -> int:
    """The number of a sample's row in its data set."""
    return int(sample.columns.get(ROW, -1))
