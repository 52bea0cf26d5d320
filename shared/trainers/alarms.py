"""Alarms of an online run: what commonly goes wrong, told once by name, size and remedy.

It reads the figures that a trainer logs and keeps a few numbers of its own. It measures nothing and stops nothing:
what it tells is for the reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from shared.errors import UserError
from shared.runtime.report_text import as_number, format_number

__all__ = ["AlarmLimits", "Alarms"]

LOSS, ENTROPY, KL = "loss", "entropy", "kl"
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
SPREADLESS, REWARD = "frac_reward_zero_std", "reward"
DIVERSITY = "sample_diversity"
COUNTS = ("patience", "start", "kl_window", "diversity_patience")
WITH_START = (ENTROPY, LENGTH, REWARD)


@dataclass(frozen=True)
class AlarmLimits:
    """When an alarm is told. `math.inf` turns an upper limit off, 0 a lower one.

    Args:
        patience: logs in a row beyond a limit before it is told, and within it before it may be told again.
        start: logs whose median is the start that entropy and length are compared with, and logs of the KL before
            its growth is judged. A reward is compared with its first log.
        entropy_floor: nats per action; an entropy below it is alarming wherever it started.
        entropy_share: share of the start; an entropy below it is alarming. A healthy run may end at a fifth.
        length_factor: of the start; a longer mean length is alarming. Reasoning that pays off doubles or triples it.
        length_least: tokens; a shorter mean length is never alarming.
        clipped_ratio: share of completions cut at the longest length allowed.
        kl_bound: nats per action; raise it where the log holds the sum over a completion.
        kl_factor: of the median of the last `kl_window` logs; a KL that jumps beyond it is alarming. Steady growth
            from zero is what training does.
        kl_least: nats per action; below it no jump is alarming.
        kl_window: logs.
        spreadless: share of prompts all of whose samples got the same reward.
        diversity: share of the start; samples that are less unlike each other are alarming while the reward is above
            its own start: over-optimisation.
        diversity_least: share of the start; below it it is collapse, whatever the reward does.
        diversity_patience: logs in a row of either; a model that makes pictures can be spoilt in few steps.

    Raises:
        UserError: a limit that is no number or negative, or a count below 1.
    """

    patience: int = 5
    start: int = 5
    entropy_floor: float = 0.01
    entropy_share: float = 0.1
    length_factor: float = 4.0
    length_least: float = 32.0
    clipped_ratio: float = 0.9
    kl_bound: float = 1.0
    kl_factor: float = 10.0
    kl_least: float = 0.1
    kl_window: int = 10
    spreadless: float = 0.9
    diversity: float = 0.5
    diversity_least: float = 0.2
    diversity_patience: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if math.isnan(value) or value < 0:
                raise UserError(f"{field.name}={value}: a limit of an alarm must be 0 or more.")
            if field.name in COUNTS and value < 1:
                raise UserError(f"{field.name}={value}: must be a number of logs, 1 or more.")


class Alarms:
    """Watches the figures of an online run. Each kind is told once, and again only after it had cleared.

    A figure that is missing from a log, or not finite, says nothing about its kind; but for the loss, an infinite KL
    and a reward that is NaN, which are alarming.

    Args:
        limits: when an alarm is told; the defaults suit runs on tokens with a mean KL per token, and on pictures.
    """

    def __init__(self, limits: AlarmLimits | None = None) -> None:
        self.limits = limits or AlarmLimits()
        self._start: dict[str, list[float]] = {name: [] for name in WITH_START}
        self._kl: list[float] = []
        self._beyond: dict[str, int] = {}
        self._within: dict[str, int] = {}
        self._told: list[str] = []

    @property
    def active(self) -> list[str]:
        """The kinds that were told and have not cleared, oldest first."""
        return list(self._told)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What is to be told after this log.

        Args:
            step: the optimizer step of the log.
            metrics: the log: `loss`, `entropy`, `kl`, `completions/mean_length`, `completions/clipped_ratio`,
                `frac_reward_zero_std`, `sample_diversity` (1 at the start), `reward`; others are ignored, any may be
                missing.

        Returns:
            One text a kind that is new: what, by how much, what to do. Usually none.
        """
        found = {name: as_number(value) for name, value in metrics.items()}
        known = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        texts = [
            self._judge_loss(found.get(LOSS)),
            self._judge_entropy(known.get(ENTROPY)),
            self._judge_length(known.get(LENGTH)),
            self._judge_clipped(known.get(CLIPPED)),
            self._judge_kl(found.get(KL)),
            self._judge_spread(known.get(SPREADLESS), known.get(REWARD)),
            self._judge_diversity(known.get(DIVERSITY), known.get(REWARD)),
            self._judge_reward(found.get(REWARD)),
        ]
        return [f"Step {step:,}: {text}" for text in texts if text]

    def state(self) -> dict[str, Any]:
        """What an exact resume needs, in JSON's types."""
        return {
            "start": {name: list(values) for name, values in self._start.items()},
            "kl": list(self._kl),
            "beyond": dict(self._beyond),
            "within": dict(self._within),
            "told": list(self._told),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._start = {name: list(state["start"].get(name, ())) for name in WITH_START}
        self._kl = list(state["kl"])
        self._beyond, self._within = dict(state["beyond"]), dict(state["within"])
        self._told = list(state["told"])

    def _new(self, kind: str, beyond: bool, *, patience: int | None = None) -> bool:
        """Count one log of `kind`; whether the alarm is to be told now."""
        patience = patience or self.limits.patience
        if not beyond:
            self._beyond[kind] = 0
            self._within[kind] = self._within.get(kind, 0) + 1
            # One good log in between is noise: a figure that hovers about its limit is told once.
            if kind in self._told and self._within[kind] >= patience:
                self._told.remove(kind)
            return False
        self._within[kind] = 0
        self._beyond[kind] = self._beyond.get(kind, 0) + 1
        if kind in self._told or self._beyond[kind] < patience:
            return False
        self._told.append(kind)
        return True

    def _since(self, name: str, value: float) -> float | None:
        """The start of figure `name`, once enough logs have told it."""
        first = self._start[name]
        if len(first) < self.limits.start:
            first.append(value)
            return None
        return median(first)

    def _judge_loss(self, loss: float | None) -> str | None:
        if loss is None or not self._new("loss", not math.isfinite(loss), patience=1):
            return None
        return (
            f"the loss is {loss}: the weights may be spoilt already. Go back to a checkpoint from before it and "
            "lower the learning rate, clip the gradients (max_grad_norm) or train in bf16 instead of fp16."
        )

    def _judge_entropy(self, entropy: float | None) -> str | None:
        if entropy is None:
            return None
        limits, start = self.limits, self._since(ENTROPY, entropy)
        least = max(limits.entropy_floor, limits.entropy_share * (start or 0.0))
        if not self._new("entropy", entropy < least):
            return None
        if start is None or start < limits.entropy_floor:
            told = "has been so from the start: the samples of a prompt hardly differ. Sample at a higher temperature"
        else:
            told = f"was {format_number(start)} at the start: the policy collapses to one answer. Raise beta"
        return (
            f"entropy collapse: {format_number(entropy)} nats, below {format_number(least)}; it {told}, or lower the "
            "learning rate, raise epsilon_high (clip-higher), or add an entropy bonus."
        )

    def _judge_length(self, length: float | None) -> str | None:
        if length is None:
            return None
        limits, start = self.limits, self._since(LENGTH, length)
        if start is None:
            return None
        beyond = length > limits.length_factor * start and length > limits.length_least
        if not self._new("length", beyond):
            return None
        return (
            f"length blow-up: completions have {format_number(length)} tokens on average, "
            f"{format_number(length / max(start, 1e-9))} times the {format_number(start)} of the start. If the reward "
            "does not rise with it, add a reward against overlong completions, raise beta or lower the learning rate; "
            "loss_type dr_grpo or dapo does not favour long wrong answers."
        )

    def _judge_clipped(self, ratio: float | None) -> str | None:
        if ratio is None or not self._new("clipped", ratio > self.limits.clipped_ratio):
            return None
        return (
            f"{100 * ratio:.0f} % of the completions are cut at the longest length allowed, so that their answers are "
            "missing. Raise max_completion_length, check that the model knows its end token, or add a reward against "
            "overlong completions."
        )

    def _judge_kl(self, kl: float | None) -> str | None:
        if kl is None or math.isnan(kl):
            return None
        limits = self.limits
        usual = median(self._kl) if len(self._kl) >= min(limits.start, limits.kl_window) else None
        if math.isfinite(kl):
            self._kl = [*self._kl, kl][-limits.kl_window :]
        jumped = usual is not None and kl > max(limits.kl_least, limits.kl_factor * max(usual, 0.0))
        # Two kinds, since a jump clears by itself once it lasts, while the bound stays crossed. It must be told before
        # it fills the larger half of the window and so becomes the usual.
        quick = max(1, min(limits.patience, limits.kl_window // 2))
        above, grew = self._new("kl", kl > limits.kl_bound), self._new("kl_jump", jumped, patience=quick)
        if not above and not grew:
            return None
        size = f"above the bound of {format_number(limits.kl_bound)}"
        if not above and usual is not None:
            size = f"{format_number(kl / usual)} times" if usual > 0 else "far above"
            size += f" its usual {format_number(usual)}"
        return (
            f"KL blow-up: {format_number(kl)} nats from the reference, {size}. The policy runs away from what it was: "
            "raise beta, lower the learning rate, or look at the newest rollouts for a reward that is being gamed."
        )

    def _judge_diversity(self, diversity: float | None, reward: float | None) -> str | None:
        if diversity is None:
            return None
        limits, first = self.limits, self._start[REWARD]
        if not first and reward is not None:  # the first log alone: a model can be spoilt before the fifth
            first.append(reward)
        risen = reward is not None and reward > first[0]
        few, least = limits.diversity_patience, limits.diversity_least
        gone = self._new("collapse", diversity < least, patience=few)
        narrow = self._new("over_optimisation", risen and least <= diversity < limits.diversity, patience=few)
        if not gone and not narrow:
            return None
        size = f"samples differ {100 * diversity:.0f} % as much as at the start"
        if risen:
            size += f", while the reward rose from {format_number(first[0])} to {format_number(reward)}"
        return (
            f"{'collapse' if gone else 'over-optimisation'}: {size}. Look at the pictures in the report: if they lose "
            "what the reward does not see, go back to an earlier checkpoint, train for fewer steps, lower the "
            "learning rate, hold the model nearer to its start (beta, a smaller adapter), or add a reward for what is "
            "lost."
        )

    def _judge_reward(self, reward: float | None) -> str | None:
        if reward is None or not self._new("reward", math.isnan(reward)):
            return None
        return (
            "no reward: none applies to any sample, so that nothing is learnt. See what the reward functions "
            "return for the newest rollouts; None and NaN say that a reward does not apply."
        )

    def _judge_spread(self, share: float | None, reward: float | None) -> str | None:
        if share is None or not self._new("spread", share > self.limits.spreadless):
            return None
        mean = "" if reward is None else f" (mean reward {format_number(reward)})"
        return (
            f"rewards without spread: for {100 * share:.0f} % of the prompts all samples got one reward{mean}, so "
            "that they teach nothing. The prompts are too easy or too hard, or the reward too coarse: change them, "
            "sample more of each prompt or with more randomness, or turn dynamic sampling on."
        )
