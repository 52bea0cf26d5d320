"""Alarms of an online run: told when a series goes wrong, once, and never on curves that are as they should be."""

from __future__ import annotations

import json
import math

import pytest
import torch

from shared.errors import UserError
from shared.trainers.alarms import AlarmLimits, Alarms

LIMITS = AlarmLimits(patience=3, start=3)


def told(alarms: Alarms, name: str, values, *, first: int = 1) -> dict[int, str]:
    """Step -> text of the alarms on a series of one figure."""
    texts = {step: alarms.check(step, {name: value}) for step, value in enumerate(values, start=first)}
    assert all(len(text) <= 1 for text in texts.values())
    return {step: text[0] for step, text in texts.items() if text}


def test_entropy_that_collapses_is_told_once_its_patience_is_over() -> None:
    series = [0.8, 0.8, 0.8, 0.4, 0.1, 0.05, 0.05, 0.04, 0.04, 0.04]  # a tenth of the start is 0.08, from step 6 on
    found = told(Alarms(LIMITS), "entropy", series)
    assert list(found) == [8]
    assert found[8].startswith("Step 8: entropy collapse: 0.04 nats, below 0.08; it was 0.8 at the start")
    assert "Raise beta" in found[8] and "learning rate" in found[8]


def test_entropy_below_the_floor_from_the_start_is_told_as_that() -> None:
    found = told(Alarms(LIMITS), "entropy", [0.001] * 6)
    assert list(found) == [3]
    assert "from the start" in found[3] and "higher temperature" in found[3]


def test_an_alarm_is_told_again_after_it_has_cleared_and_not_for_noise_about_the_limit() -> None:
    alarms = Alarms(LIMITS)
    bad, good = [0.01] * 3, [0.5] * 3
    assert list(told(alarms, "entropy", [0.8] * 3 + bad)) == [6]
    assert alarms.active == ["entropy"]
    assert not told(alarms, "entropy", [0.5, 0.5, *bad, 0.5, *bad], first=7)
    assert not told(alarms, "entropy", good, first=20)
    assert alarms.active == []
    assert list(told(alarms, "entropy", bad, first=30)) == [32]


def test_a_missing_figure_counts_neither_for_nor_against() -> None:
    alarms = Alarms(LIMITS)
    told(alarms, "entropy", [0.8] * 3 + [0.01] * 2)
    assert alarms.check(6, {}) == []
    assert alarms.check(7, {"entropy": math.nan, "eval_reward": 1.0}) == []
    assert len(alarms.check(8, {"entropy": 0.01})) == 1


def test_length_that_blows_up_and_growth_that_does_not() -> None:
    found = told(Alarms(LIMITS), "completions/mean_length", [40, 50, 60, 190, 201, 210, 220, 230])
    assert list(found) == [7]  # four times the median 50
    assert "220 tokens" in found[7] and "4.4 times the 50" in found[7]
    assert not told(Alarms(LIMITS), "completions/mean_length", [50, 50, 50, *range(60, 200, 5)])
    assert not told(Alarms(LIMITS), "completions/mean_length", [3, 3, 3, *range(4, 33)])


def test_completions_that_are_nearly_all_cut() -> None:
    found = told(Alarms(LIMITS), "completions/clipped_ratio", [0.9, 0.95, 0.95, 0.2, 0.95, 0.95, 0.96])
    assert list(found) == [7]
    assert "96 %" in found[7] and "max_completion_length" in found[7]


def test_kl_above_its_bound() -> None:
    found = told(Alarms(LIMITS), "kl", [0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7])
    assert list(found) == [6]
    assert "1.5 nats" in found[6] and "bound of 1" in found[6] and "raise beta" in found[6]
    assert list(told(Alarms(LIMITS), "kl", [math.inf] * 3)) == [3]


def test_kl_that_jumps_is_told_below_the_bound_and_by_its_factor() -> None:
    found = told(Alarms(LIMITS), "kl", [0.02] * 12 + [0.4] * 12)
    assert list(found) == [15]
    assert "20 times its usual 0.02" in found[15]
    assert not told(Alarms(LIMITS), "kl", [0.02] * 12 + [0.9] + [0.02] * 5)
    assert not told(Alarms(LIMITS), "kl", [0.001] * 12 + [0.09] * 5)  # ninety times as much, and still next to nothing


def test_kl_that_jumps_is_told_with_any_patience_the_window_allows() -> None:
    patient = Alarms(AlarmLimits(patience=50, kl_window=8))
    assert list(told(patient, "kl", [0.02] * 12 + [0.4] * 12)) == [16]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_at_once(loss: float) -> None:
    found = told(Alarms(LIMITS), "loss", [0.1, loss, loss, 0.1, torch.tensor(loss)])
    assert list(found) == [2, 5]
    assert "max_grad_norm" in found[2]


def test_a_reward_that_applies_to_nothing() -> None:
    texts = told(Alarms(), "reward", [math.nan] * 60)
    assert len(texts) == 1 and "none applies" in next(iter(texts.values()))
    assert not told(Alarms(), "reward", [0.0, math.nan, 0.5] * 20)


def test_rewards_without_spread_tell_the_mean_reward() -> None:
    alarms = Alarms(LIMITS)
    texts = [alarms.check(step, {"frac_reward_zero_std": 0.95, "reward": 0.02}) for step in range(1, 6)]
    assert [len(text) for text in texts] == [0, 0, 1, 0, 0]
    assert "95 %" in texts[2][0] and "mean reward 0.02" in texts[2][0]
    assert not told(Alarms(LIMITS), "frac_reward_zero_std", [0.9] * 10)


def diversity(alarms: Alarms, values, rewards, *, first: int = 1) -> dict[int, str]:
    """Step -> text of the alarms on the diversity of samples."""
    logs = [{"sample_diversity": value, "reward": reward} for value, reward in zip(values, rewards, strict=True)]
    texts = {step: alarms.check(step, log) for step, log in enumerate(logs, start=first)}
    return {step: text[0] for step, text in texts.items() if text}


def test_samples_that_become_alike_while_the_reward_rises_are_over_optimised() -> None:
    limits = AlarmLimits(diversity_patience=2)
    values = [1.0, 1.0, 1.0, 0.8, 0.6, 0.45, 0.4, 0.35, 0.35]
    alarms = Alarms(limits)
    found = diversity(alarms, values, [0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
    assert list(found) == [7] and alarms.active == ["over_optimisation"]
    assert found[7].startswith("Step 7: over-optimisation: samples differ 40 % as much as at the start")
    assert "reward rose from 0.5 to 0.9" in found[7] and "learning rate" in found[7]
    assert not diversity(Alarms(limits), values, [0.5] * 9)  # nothing is gained by it: no over-optimisation
    assert not diversity(Alarms(limits), [1.0] * 3 + [0.55] * 6, [0.5] * 3 + [0.9] * 6)


def test_samples_that_are_all_one_have_collapsed_whatever_the_reward() -> None:
    alarms = Alarms(AlarmLimits(diversity_patience=2))
    found = diversity(alarms, [1.0, 1.0, 1.0, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.4, 0.4, 0.4])
    assert list(found) == [5] and "collapse: samples differ 10 %" in found[5] and "rose" not in found[5]
    alarms = Alarms(AlarmLimits(diversity_patience=2))
    found = diversity(alarms, [1.0, 0.75, 0.29, 0.1, 0.1, 0.1, 0.1], [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8])
    assert list(found) == [5] and "collapse" in found[5] and "rose from 0.5 to 0.8" in found[5]  # and nothing more
    assert not told(Alarms(AlarmLimits(diversity_patience=2)), "sample_diversity", [math.nan] * 9)


def test_several_alarms_can_be_told_at_one_step() -> None:
    alarms = Alarms(AlarmLimits(patience=1))
    texts = alarms.check(1200, {"loss": math.nan, "entropy": 0.0, "kl": 5.0, "frac_reward_zero_std": 1.0})
    assert len(texts) == 4 and all(text.startswith("Step 1,200: ") for text in texts)
    assert alarms.active == ["loss", "entropy", "kl", "spread"]


def test_a_normal_run_is_quiet() -> None:
    alarms = Alarms()
    for step in range(600):
        done = 1 - math.exp(-step / 150)
        noise = 0.15 * math.sin(12.9898 * step)
        metrics = {
            "loss": 0.02 * noise,
            "reward": done,
            "entropy": (0.9 - 0.7 * done) * (1 + noise),
            "kl": 0.3 * done * (1 + noise),
            "completions/mean_length": 60 * (1 + 1.5 * done) * (1 + noise),
            "completions/clipped_ratio": 0.3 * (1 - done),
            "frac_reward_zero_std": 0.1 + 0.6 * done + noise,
        }
        assert alarms.check(step, metrics) == []


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_resumed_run_tells_the_same(cut: int) -> None:
    logs = [{"entropy": 0.8, "kl": 0.02, "completions/mean_length": 50.0, "loss": 0.1}] * 12
    logs += [{"entropy": 0.01, "kl": 0.6, "completions/mean_length": 300.0, "loss": math.nan}] * 12
    whole, before, after = Alarms(), Alarms(), Alarms()
    texts = [whole.check(step, log) for step, log in enumerate(logs)]
    assert sum(map(len, texts)) == 4
    resumed = [before.check(step, log) for step, log in enumerate(logs[:cut])]
    after.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    resumed += [after.check(step, log) for step, log in enumerate(logs[cut:], start=cut)]
    assert resumed == texts
    assert after.state() == whole.state()


def test_limits_can_be_turned_off_and_are_checked() -> None:
    off = AlarmLimits(patience=1, clipped_ratio=math.inf, entropy_floor=0.0, entropy_share=0.0)
    assert Alarms(off).check(1, {"completions/clipped_ratio": 1.0, "entropy": 0.0}) == []
    for wrong in (
        {"patience": 0},
        {"entropy_share": -0.1},
        {"kl_bound": math.nan},
        {"kl_window": 0},
        {"diversity_patience": 0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AlarmLimits(**wrong)
