"""Several rewards at once: one table of values, NaN where a reward does not apply, and what to do when one fails.

Plain functions run one after another in the caller's thread. Those that wait (async functions, and remote ones) run
beside them and beside each other. Deliberately not here: how values are weighted into advantages
(shared.objectives.advantages), and gathering over processes.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from shared.data.rows import ROW
from shared.errors import DataError, UserError
from shared.rewards.base import OF_IMAGES, FunctionReward, Reward, RowErrors, Sample, WrongCount, made_images, name_of
from shared.rewards.loading import load_rewards
from shared.rewards.pairwise import PairReward
from shared.rewards.places import place_of
from shared.rewards.waiting import Call, TimedOut, run

logger = logging.getLogger(__name__)

ON_ERROR = {"raise": None, "zero": 0.0, "skip": math.nan}
AT_ONCE = 8  # rows of a reward that waits which are looked at beside each other
MOST_HUNG = 32  # calls of one reward that were given up and still run, before that ends the run


@dataclass
class RewardTable:
    """What K rewards say about B samples.

    Attributes:
        values: (B, K) float32; NaN where a reward does not apply.
        seconds: the time that each reward took; those that wait run at the same time.
        names: the rewards' names, each once.
        errors: reward -> rows that it failed on, and whose value was replaced.
        extras: column -> one value a row, that functions gave to `log_extra`.
        metrics: name -> mean of what functions gave to `log_metric`.
    """

    values: Tensor
    seconds: list[float]
    names: list[str]
    errors: dict[str, int] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class RewardSet:
    """Rewards that are run together.

    Args:
        rewards: what `shared.rewards.loading.load_reward` takes, one or several.
        weights: one finite number a reward; None: 1 for each.
        on_error: what happens where a reward raises, takes too long, returns a wrong number of values, or gives a
            value that is infinite or no number. `raise`: a UserError that names reward and row. `zero`: 0 for the
            rows concerned. `skip`: the reward does not apply to them. NaN and None are no errors: they say that a
            reward does not apply.
        timeout: seconds for an async or remote reward; None: no limit. A plain function is not limited, for it cannot
            be stopped: make it async, or let it mind its time itself.
        processing_classes: one a reward, for those that are models; None where it is loaded beside the model.
        device: where models that are given by name are put.

    Raises:
        UserError: a reward is not known or cannot be loaded, or the weights do not fit.

    Example:
        >>> rewards = RewardSet(["think_format_reward", lambda completions, **_: [len(c) for c in completions]])
        >>> rewards([Sample("Why?", "<think>so</think> yes")]).values
        tensor([[ 1., 21.]])
    """

    def __init__(
        self,
        rewards: Sequence[Any] | Any,
        *,
        weights: Sequence[float] | None = None,
        on_error: Literal["raise", "zero", "skip"] = "raise",
        timeout: float | None = None,
        processing_classes: Sequence[Any] | Any = None,
        device: torch.device | str | None = None,
    ):
        given = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        if not given:
            raise UserError("There is no reward: give at least one.")
        if on_error not in ON_ERROR:
            raise UserError(f"on_reward_error is {on_error!r}; allowed: {', '.join(ON_ERROR)}.")
        if timeout is not None and not timeout > 0:
            raise UserError(f"The timeout of rewards is {timeout} seconds: it must be more than 0.")
        self.weights = _weights(weights, len(given))
        self.on_error, self.timeout = on_error, timeout
        self.rewards: list[Reward] = load_rewards(given, processing_classes=processing_classes, device=device)
        self.names = unique_names([name_of(reward) for reward in self.rewards])
        self._told: set[tuple[str, str]] = set()
        self._where = "there"
        self._hung: dict[int, list[Call]] = {}

    def skipping(self, where: str) -> RewardSet:
        """The same rewards, of which one that fails does not apply.

        Args:
            where: to which samples, for the warning, which comes once of each kind.
        """
        same = copy.copy(self)
        same.on_error, same._where, same._told = "skip", where, set()
        return same

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError where a function takes something that the rows do not have.

        Args:
            columns: the names of the data's columns, and what the trainer gives beside them (`completion_ids`,
                `trainer_state`, ...).
        """
        for reward in self.rewards:
            if isinstance(reward, (FunctionReward, PairReward)):
                reward.check(columns)

    def __call__(self, samples: Sequence[Sample], **context: Any) -> RewardTable:
        """Score samples.

        Args:
            samples: B samples.
            context: more for the functions that take it, such as `trainer_state`.

        Raises:
            UserError: a reward failed and `on_error` is `raise`, or a function takes what is not there.
        """
        table = RewardTable(torch.full((len(samples), len(self.names)), math.nan), [0.0] * len(self.names), self.names)
        if not samples:
            return table
        beside = OF_IMAGES if made_images(samples) else ()
        self.check({*context, *beside, *(name for sample in samples for name in sample.columns)})
        logged: dict[str, list[float]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != len(samples):
                raise UserError(f"log_extra({column!r}) got {len(values)} values for {len(samples)} rows")
            table.extras[column] = list(values)

        def log_metric(name: str, value: float) -> None:
            logged.setdefault(name, []).append(float(value))

        context = {**context, "log_extra": log_extra, "log_metric": log_metric}
        waiting = {
            at: self._start(at, samples, context)
            for at, reward in enumerate(self.rewards)
            if getattr(reward, "concurrent", False)
        }
        try:
            # the plain ones first: they take their time while the others wait
            for at in sorted(range(len(self.rewards)), key=lambda at: at in waiting):
                found, table.seconds[at] = (
                    self._finish(at, waiting[at]) if at in waiting else run(self.rewards[at], samples, context)
                )
                table.values[:, at] = self._settle(at, found, samples, context, table)
        except BaseException:
            for call in waiting.values():
                call.cancel()
            raise
        table.metrics = {name: sum(values) / len(values) for name, values in logged.items()}
        return table

    def _start(self, at: int, samples: Sequence[Sample], context: Mapping[str, Any]) -> Call:
        return Call(self.rewards[at], samples, context, name=self.names[at], timeout=self.timeout)

    def _finish(self, at: int, call: Call) -> tuple[Any, float]:
        """What a reward that waits returned or raised, and the seconds it took."""
        found, seconds = call.result()
        if call.hangs:
            hung = self._hung[at] = [each for each in [*self._hung.get(at, ()), call] if each.hangs]
            if len(hung) >= MOST_HUNG:
                raise UserError(
                    f"{len(hung)} calls of reward {self.names[at]} took more than {self.timeout:g} s and have not "
                    "returned yet: it hangs. Give what it waits for a time limit of its own."
                )
        return found, seconds

    def _settle(
        self, at: int, found: Any, samples: Sequence[Sample], context: Mapping[str, Any], table: RewardTable
    ) -> Tensor:
        """The values (B,) of a reward from what it returned or raised; failed rows as `on_error` says."""
        name, count = self.names[at], len(samples)
        if not isinstance(found, Exception):
            if found.isnan().all() and self._once(name, "nothing applies"):
                logger.warning("Reward %s gave None or NaN for all %d rows: it applies to none of them.", name, count)
            return found
        if isinstance(found, RowErrors):
            values, errors = _numbers(found.values), found.errors
        else:
            values, errors = self._locate(at, found, samples, context)
        if self.on_error == "raise":
            raise UserError(self._message(name, errors or {0: found}, samples, context, whole=not errors)) from found
        errors = errors or dict.fromkeys(range(count), found)
        table.errors[name] = len(errors)
        for row in sorted(errors):
            if self._once(name, _kind(errors[row])):
                told = self._message(name, {row: errors[row]}, samples, context, whole=len(errors) == count)
                done = "has value 0" if self.on_error == "zero" else "does not apply"
                logger.warning("%s It %s %s; more of this kind are not told.", told, done, self._where)
        values[list(errors)] = ON_ERROR[self.on_error]
        return values

    def _locate(
        self, at: int, error: Exception, samples: Sequence[Sample], context: Mapping[str, Any]
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Find the rows that a reward raises on, by giving it one row at a time; none where each passes alone.

        Returns:
            The others' values, and the errors. Only the first error where it will be raised.
        """
        count = len(samples)
        values = torch.full((count,), math.nan)
        if isinstance(error, (WrongCount, TimedOut)) or count == 1:
            return values, {0: error} if count == 1 else {}
        quiet = {**context, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
        errors: dict[int, Exception] = {}
        for row, (found, _) in enumerate(self._each(at, [[sample] for sample in samples], quiet)):
            if isinstance(found, Exception) and not isinstance(found, WrongCount):
                errors[row] = next(iter(found.errors.values())) if isinstance(found, RowErrors) else found
                if self.on_error == "raise":
                    return values, errors
        kept = [row for row in range(count) if row not in errors]
        if not errors or not kept:
            return values, errors
        # in one call: a function may compare the rows it is given
        found, _ = next(self._each(at, [[samples[row] for row in kept]], quiet))
        if isinstance(found, Exception):
            return values, {}
        values[kept] = found
        return values, errors

    def _each(
        self, at: int, parts: Sequence[Sequence[Sample]], context: Mapping[str, Any]
    ) -> Iterator[tuple[Any, float]]:
        """What a reward says of each part; as many are begun at once as are needed all the same."""
        if not getattr(self.rewards[at], "concurrent", False):
            yield from (run(self.rewards[at], part, context) for part in parts)
            return
        rest = iter(parts)
        first = islice(rest, 1 if self.on_error == "raise" else AT_ONCE)
        calls = deque(self._start(at, part, context) for part in first)
        try:
            while calls:
                yield self._finish(at, calls.popleft())
                calls.extend(self._start(at, part, context) for part in islice(rest, 1))
        finally:
            for call in calls:
                call.cancel()

    def _message(
        self,
        name: str,
        errors: Mapping[int, Exception],
        samples: Sequence[Sample],
        context: Mapping[str, Any],
        *,
        whole: bool,
    ) -> str:
        row = min(errors)
        error = errors[row]
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason} {place_of(error)}".strip()
        if isinstance(error, DataError):  # it counts the rows of its call
            reason = re.sub(r"^row \d+: ", "", reason)
        place = _place(samples[row], row, context.get("mode"))
        if whole and len(samples) > 1:
            place = f"{len(samples)} rows together, the first {place}"
        elif len(errors) > 1:
            place += f", and on {len(errors) - 1} more"
        return f"Reward {name} failed on {place}: {reason.rstrip('.')}." + (
            " Mend it, or give on_reward_error: zero or skip." if self.on_error == "raise" else ""
        )

    def _once(self, name: str, kind: str) -> bool:
        if (name, kind) in self._told:
            return False
        self._told.add((name, kind))
        return True


def joined_tables(parts: Sequence[RewardTable]) -> RewardTable:
    """One table of several, made by the same rewards of some samples each."""
    rows = [len(part.values) for part in parts]
    table = RewardTable(torch.cat([part.values for part in parts]), [], parts[0].names)
    table.seconds = [sum(seconds) for seconds in zip(*(part.seconds for part in parts), strict=True)]
    for name in dict.fromkeys(name for part in parts for name in part.errors):
        table.errors[name] = sum(part.errors.get(name, 0) for part in parts)
    for name in dict.fromkeys(name for part in parts for name in part.extras):
        columns = [part.extras.get(name, [None] * count) for part, count in zip(parts, rows, strict=True)]
        table.extras[name] = [value for column in columns for value in column]
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        found = [(part.metrics[name], count) for part, count in zip(parts, rows, strict=True) if name in part.metrics]
        table.metrics[name] = sum(value * count for value, count in found) / sum(count for _, count in found)
    return table


def unique_names(names: Sequence[str]) -> list[str]:
    """Names in which none comes twice: the second `a` is `a_2`."""
    found: list[str] = []
    for name in names:
        number, own = 1, name
        while own in found:
            number += 1
            own = f"{name}_{number}"
        found.append(own)
    return found


def _weights(weights: Sequence[float] | None, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count)
    if len(weights) != count:
        raise UserError(f"There are {len(weights)} reward_weights for {count} rewards: give one for each.")
    for weight in weights:
        if isinstance(weight, (bool, str)) or not math.isfinite(weight):
            raise UserError(f"reward_weights has {weight!r}: a weight must be a finite number.")
    return torch.tensor([float(weight) for weight in weights])


def _numbers(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def _kind(error: Exception) -> str:
    """Errors of one kind are told once: by their type, ours by their words without numbers."""
    return re.sub(r"[\d.]+|'.*'", "", str(error)) if isinstance(error, UserError) else type(error).__name__


def _place(sample: Sample, at: int, mode: str | None) -> str:
    number = sample.columns.get(ROW)
    row = f"sample {at} of the call" if number is None else f"row {number}"
    if number is not None and mode not in (None, "train"):
        row = f"held-out {row}"
    output = sample.output
    if isinstance(output, (list, tuple)):
        output = " ".join(str(each.get("content")) if isinstance(each, Mapping) else repr(each) for each in output)
    if hasattr(output, "detach"):  # an image
        output = sample.prompt if isinstance(sample.prompt, str) else f"an image of {tuple(output.shape)}"
    text = output if isinstance(output, str) else repr(output)
    return f"{row} ({text[:60] + '…' if len(text) > 60 else text!r})"
