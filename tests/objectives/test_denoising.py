"""Objectives of denoisers: numbers worked out by hand."""

import math

import pytest
import torch

from shared.objectives.denoising import (
    denoising_log_probs,
    denoising_target,
    mean_squared_error,
    nft_losses,
    optimality,
)
from shared.objectives.preference import pair_objective, pairs_of

ZERO = torch.zeros(2, 1, 1, 2)
# chosen and rejected: errors .2 and .58 under the policy, .5 and .4 under the reference
POLICY = torch.tensor([[0.2, 0.6], [1.0, 0.4]]).view(2, 1, 1, 2)
REFERENCE = torch.tensor([[1.0, 0.0], [0.4, 0.8]]).view(2, 1, 1, 2)


def diffusion_dpo(given, loss_type="sigmoid", beta=10.0):
    logp, ref = (denoising_log_probs(each, ZERO)[:, None] for each in (given, REFERENCE))
    losses = pair_objective(loss_type, beta=beta)(pairs_of(logp, torch.ones(2, 1), ref))
    return losses.total(pairs=1, tokens=1)


def test_targets_of_each_kind_of_denoiser():
    clean, noise = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    expected = {"epsilon": [0.5, 3.0], "sample": [2.0, -1.0], "v_prediction": [-0.8, 3.0], "flow": [-1.5, 4.0]}
    for kind, values in expected.items():
        assert torch.allclose(denoising_target(kind, clean, noise, alpha, sigma), torch.tensor([values])), kind
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample, flow"):
        denoising_target("score", clean, noise, alpha, sigma)


def test_the_error_is_a_mean_over_elements_in_float32():
    given = torch.full((2, 3, 4, 4), 2.0, dtype=torch.bfloat16)
    error = mean_squared_error(given, torch.zeros_like(given))
    assert error.dtype == torch.float32 and error.tolist() == [4.0, 4.0]


def test_diffusion_dpo_by_hand():
    # -½ 10 [(.2 - .5) - (.58 - .4)] = 2.4
    assert diffusion_dpo(POLICY).item() == pytest.approx(math.log1p(math.exp(-2.4)), abs=1e-6)
    # without the ½ it would be log(1 + e^-4.8)
    assert diffusion_dpo(POLICY).item() != pytest.approx(math.log1p(math.exp(-4.8)), abs=1e-3)
    assert diffusion_dpo(POLICY, "hinge", beta=1.0).item() == pytest.approx(1 - 0.24, abs=1e-6)
    assert diffusion_dpo(POLICY, "ipo", beta=2.0).item() == pytest.approx((0.24 - 0.25) ** 2, abs=1e-6)
    assert diffusion_dpo(POLICY, "sft").item() == pytest.approx(0.1, abs=1e-6)


def test_diffusion_dpo_lowers_the_chosen_error_and_raises_the_rejected():
    given = POLICY.clone().requires_grad_()
    diffusion_dpo(given).backward()
    # dL/de = ± ½ β σ(-2.4), and de/dp = p for two elements
    slope = 5 * torch.sigmoid(torch.tensor(-2.4))
    expected = torch.stack([slope * POLICY[0], -slope * POLICY[1]])
    assert torch.allclose(given.grad, expected, atol=1e-6)


def test_how_far_a_sample_is_a_good_one():
    found = optimality(torch.tensor([-10.0, -5.0, 0.0, 2.5, 5.0, 7.5]), 5.0)
    assert found.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(ValueError, match="max_advantage"):
        optimality(torch.zeros(1), 0.0)


def test_nft_by_hand():
    estimate = torch.tensor([[1.0, 3.0]], requires_grad=True)
    old, clean = torch.tensor([[2.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 1.0]])
    # positive (1.5, 2.5): 2.25 / 1.5; negative (2.5, 1.5): 3.25 / 1.5; 5/.5 (.75 * 1.5 + .25 * 2.1667)
    losses = nft_losses(estimate, old, clean, torch.tensor([0.75]), beta=0.5, max_advantage=5.0)
    assert losses.tolist() == pytest.approx([50 / 3])
    losses.sum().backward()
    assert estimate.grad[0].tolist() == pytest.approx([5 / 3, 10 / 3]) and old.grad is None


@pytest.mark.parametrize("good, towards", [(1.0, True), (0.0, False)])
def test_nft_moves_towards_good_samples_and_away_from_bad_ones(good, towards):
    estimate = torch.tensor([[1.0, 1.0]], requires_grad=True)
    clean = torch.tensor([[3.0, 0.0]])
    nft_losses(estimate, estimate.detach(), clean, torch.tensor([good]), beta=0.1).sum().backward()
    moved = -estimate.grad[0]
    assert bool((moved * (clean - estimate.detach())[0] > 0).all()) is towards


def test_nft_at_the_old_policy_does_not_depend_on_beta_but_by_its_scale():
    estimate, clean = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    found = [nft_losses(estimate, estimate, clean, torch.tensor([0.3]), beta=b, max_advantage=b) for b in (0.1, 1.0)]
    assert torch.allclose(*found)
    exact = nft_losses(clean, clean, clean, torch.tensor([0.5]))  # a weight of 0 would be 0 / 0
    assert exact.tolist() == [0.0]
    for options in ({"beta": 0.0}, {"max_advantage": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            nft_losses(clean, clean, clean, torch.tensor([0.5]), **options)
