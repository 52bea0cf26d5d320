"""Penalties for leaving the reference and the rules that set their weight, against hand-computed numbers."""

import math

import pytest
import torch

from shared.objectives.kl_control import AdaptiveKL, FixedKL, kl_penalty, skips_batch, stops_early

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # logp - ref is ln 2 and -ln 2
        ("kl", [LN2, -LN2]),
        ("abs", [LN2, LN2]),
        ("mse", [LN2**2 / 2] * 2),
        ("k3", [0.5 - 1 + LN2, 2 - 1 - LN2]),
    ],
)
def test_penalties_by_hand(kind, expected):
    logp = torch.zeros(1, 2, requires_grad=True)
    found = kl_penalty(logp, torch.tensor([[-LN2, LN2]]), kind=kind)
    torch.testing.assert_close(found, torch.tensor([expected]))
    assert not found.requires_grad


def test_the_full_divergence_by_hand():
    # (¾, ¼) to (½, ½): ¾ ln 3/2 + ¼ ln 1/2; what the policy rules out adds nothing
    policy, ref = torch.tensor([[0.75, 0.25], [0.0, 1.0]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    expected = torch.tensor([0.75 * math.log(1.5) - 0.25 * LN2, LN2])
    torch.testing.assert_close(kl_penalty(policy, ref, kind="full"), expected)


def test_the_full_divergence_is_what_the_sampled_ones_estimate():
    policy, ref = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    full = kl_penalty(policy, ref, kind="full")
    for kind in ("kl", "k3"):
        torch.testing.assert_close((policy.exp() * kl_penalty(policy, ref, kind=kind)).sum(), full)


def test_an_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match="Unknown KL penalty 'ful'.*Did you mean 'full'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), kind="ful")


def test_the_adaptive_coefficient_by_hand():
    control = AdaptiveKL(0.2, target=6.0, horizon=1000)
    # 6.6 / 6 - 1 = .1; 60 / 6 - 1 is held at .2; 0 / 6 - 1 at -.2; each times 100 / 1000
    for kl, factor in ((6.6, 1.01), (60.0, 1.02), (math.inf, 1.02), (0.0, 0.98), (-5.0, 0.98), (6.0, 1.0)):
        before = control.coefficient
        control.step(kl, 100)
        assert control.coefficient == pytest.approx(before * factor)
    assert AdaptiveKL(control.coefficient, 6.0, 1000) == control


def test_the_fixed_coefficient_stays():
    control = FixedKL(0.05)
    control.step(100.0, 1000)
    assert control.coefficient == 0.05


def test_controllers_refuse_what_they_cannot_follow():
    for make in (lambda: FixedKL(-0.1), lambda: AdaptiveKL(math.nan)):
        with pytest.raises(ValueError, match="KL coefficient"):
            make()
    for options in ({"target": 0.0}, {"horizon": -1.0}):
        with pytest.raises(ValueError, match="must be a positive number"):
            AdaptiveKL(**options)
    with pytest.raises(ValueError, match="not a number"):
        AdaptiveKL().step(math.nan, 8)
    with pytest.raises(ValueError, match="too short"):
        AdaptiveKL(horizon=100).step(1.0, 500)


def test_when_an_update_stops_and_when_a_batch_is_left_out():
    assert not stops_early(0.15, 0.1) and stops_early(0.16, 0.1)
    assert stops_early(0.11, 0.1, factor=1.0) and not stops_early(9.0, None)
    assert stops_early(math.nan, 0.1) and not stops_early(-3.0, 0.1)
    assert not skips_batch(10.0, 10.0) and skips_batch(10.1, 10.0)
    assert skips_batch(math.nan, 10.0) and not skips_batch(math.inf, None)
    for decide in (stops_early, skips_batch):
        with pytest.raises(ValueError, match="positive number"):
            decide(1.0, 0.0)
