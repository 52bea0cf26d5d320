"""PPO's token rewards, advantages and losses against hand-computed numbers."""

import math

import pytest
import torch

from shared.objectives.moments import RunningMoments, moment_sums
from shared.objectives.reduce import token_weights
from shared.objectives.value import (
    explained_variance,
    gae,
    penalise_missing_eos,
    ppo_losses,
    ppo_metrics,
    shaped_scores,
    token_rewards,
    value_losses,
)

NAN = math.nan
LN2 = math.log(2)


def close(found, expected, **options):
    torch.testing.assert_close(found, torch.tensor(expected), **options)


def grids(seed=0, b=4, t=6):
    """logp, old, advantages, values, old values, returns, and a mask with a gap and a row that counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    logp, values = (torch.randn(b, t, generator=generator, dtype=torch.float64) for _ in range(2))
    old, old_values = (x + 0.4 * torch.randn(b, t, generator=generator, dtype=torch.float64) for x in (logp, values))
    advantages, returns = (torch.randn(b, t, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(t) < torch.tensor([6, 2, 0, 4])[:b, None]
    mask[0, 2] = False
    return logp.requires_grad_(), old, advantages, values.requires_grad_(), old_values, returns, mask


def test_the_score_stands_on_the_last_action_and_the_penalty_on_each():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    penalty = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, NAN], [NAN, 4.0, 9.0], [1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])
    found = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0, NAN]), penalty, mask, coefficient=0.5)
    # the last row has no score, the one before it no action
    close(found, [[-0.5, -1.0, 8.5], [-0.5, 19.0, 0.0], [0.0, 28.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    close(token_rewards(torch.tensor([3.0]), None, torch.tensor([[1, 1, 0]])), [[0.0, 3.0, 0.0]])


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 1.0, 7.0]])
    values = torch.tensor([[0.5, 0.2, 0.4], [1.0, 3.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    # γ = .9, λ = .5, γλ = .45
    # row 0: δ = 0 + .9·.2 - .5 = -.32, 0 + .9·.4 - .2 = .16, 1 - .4 = .6
    #        A_2 = .6, A_1 = .16 + .45·.6 = .43, A_0 = -.32 + .45·.43 = -.1265
    # row 1: δ = 2 + .9·3 - 1 = 3.7, 1 - 3 = -2; A_1 = -2, A_0 = 3.7 - .45·2 = 2.8
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    close(advantages, [[-0.1265, 0.43, 0.6], [2.8, -2.0, 0.0]])
    close(returns, [[0.3735, 0.63, 1.0], [3.8, 1.0, 0.0]])


def test_the_ends_of_lambda():
    _, _, _, values, _, rewards, mask = grids()
    values = values.detach()
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(gae(rewards, values, mask, gamma=1.0, lam=1.0)[1], to_come)
    one_step, _ = gae(rewards[3:, :4], values[3:, :4], mask[3:, :4], gamma=0.9, lam=0.0)
    following = torch.cat([values[3:, 1:4], torch.zeros(1, 1)], 1)
    torch.testing.assert_close(one_step, rewards[3:, :4] + 0.9 * following - values[3:, :4])


def test_padding_on_either_side_and_between_changes_nothing():
    rewards, values = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0.5, 1.5, -1.0]])
    plain = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    places = torch.tensor([1, 3, 6])
    spread = [torch.full((1, 8), NAN).index_copy(1, places, x) for x in (rewards, values)]
    mask = torch.zeros(1, 8).index_fill(1, places, 1)
    for found, expected in zip(gae(*spread, mask, gamma=0.9, lam=0.8), plain, strict=True):
        torch.testing.assert_close(found[:, places], expected)
        assert not found[~mask.bool()].any()


def test_gae_has_no_gradient_and_refuses_wrong_options():
    *_, values, _, rewards, mask = grids()
    assert not any(x.requires_grad for x in gae(rewards, values, mask))
    for options in ({"gamma": 1.1}, {"lam": -0.1}, {"lam": NAN}):
        with pytest.raises(ValueError, match="must be in"):
            gae(rewards, values, mask, **options)


def test_value_losses_by_hand():
    # V_old 1, ε .2: V is held within .8 and 1.2; R = 2
    # V 1.1: inside, ½ .9² · V 1.5: free ½ .5², held ½ .8², the larger · V .5: free ½ 1.5², held ½ 1.2²
    values = torch.tensor([1.1, 1.5, 0.5, NAN], requires_grad=True)
    arguments = torch.ones(4), torch.full((4,), 2.0), torch.tensor([1, 1, 1, 0])
    losses = value_losses(values, *arguments)
    close(losses.detach(), [0.405, 0.32, 1.125, 0.0])
    # V - R where the free one counts, 0 where it is held, and nothing at the masked place
    losses.sum().backward()
    close(values.grad, [-0.9, 0.0, -1.5, 0.0])
    close(value_losses(values, *arguments, epsilon=None).detach(), [0.405, 0.125, 1.125, 0.0])
    with pytest.raises(ValueError, match="clip of values"):
        value_losses(values, *arguments, epsilon=0.0)


def test_ppo_losses_by_hand():
    # ratio 2, A 1: -1.2; ratio 2, A -1: 2; ratio 1, A 3: -3. Value losses .405, .32, 1.125 as above, times .5.
    logp = torch.tensor([LN2, LN2, 0.0, 5.0])
    values = torch.tensor([1.1, 1.5, 0.5, 5.0])
    advantages, mask = torch.tensor([1.0, -1.0, 3.0, NAN]), torch.tensor([1, 1, 1, 0])
    found = ppo_losses(
        logp, torch.zeros(4), advantages, values, torch.ones(4), torch.full((4,), 2.0), mask, vf_coef=0.5
    )
    close(found, [-1.2 + 0.2025, 2.0 + 0.16, -3.0 + 0.5625, 0.0])


def test_gradients_go_the_right_way():
    logp, values = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    advantages = returns = torch.tensor([1.0, -1.0])
    ppo_losses(logp, torch.zeros(2), advantages, values, torch.zeros(2), returns, torch.ones(2)).sum().backward()
    # a descent step makes what was good likelier, and takes values to their returns: slope vf_coef (V - R)
    close(logp.grad, [-1.0, 1.0])
    close(values.grad, [-0.1, 0.1])


def test_the_loss_does_not_depend_on_how_a_step_is_cut():
    *tensors, mask = grids()
    logp, values = tensors[0], tensors[3]
    actions = mask.sum()

    def loss(rows):
        losses = ppo_losses(*(x[rows] for x in tensors), mask[rows])
        return (token_weights(mask[rows], mode="token", denominator=actions) * losses).sum()

    whole = loss(slice(None))
    gradients = torch.autograd.grad(whole, (logp, values))
    cut = loss(slice(1)) + loss(slice(1, 4))
    torch.testing.assert_close(cut, whole)
    for found, expected in zip(torch.autograd.grad(cut, (logp, values)), gradients, strict=True):
        torch.testing.assert_close(found, expected)
        assert not expected[~mask].any()


def test_metrics_are_sums_over_the_counted_actions():
    logp, old = torch.tensor([[0.1, 0.0], [0.5, NAN]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    values, old_values = torch.tensor([[1.0, 1.5], [2.0, NAN]]), torch.tensor([[1.0, 1.0], [1.9, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    found = ppo_metrics(logp, old, values, old_values, torch.full((2, 2), 2.0), mask)
    # only the second value is held, at 1.2, farther from its return of 2 than 1.5 is
    expected = {"policy_kl": -0.6, "approx_kl": 0.13, "value/mean": 4.5, "value/error": 1.25, "value/clip_ratio": 1.0}
    assert {name: total.item() for name, (total, _) in found.items()} == pytest.approx(expected)
    assert all(count.item() == 3 for _, count in found.values())


def test_explained_variance_by_hand():
    # returns 1 3 5: variance 4; errors 0 1 2 of them: variance 1
    returns = moment_sums(torch.tensor([1.0, 3.0, 5.0]))
    assert explained_variance(moment_sums(torch.tensor([0.0, 1.0, 2.0])), returns) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, moment_sums(torch.ones(3))))


def test_scores_are_scaled_shifted_and_clipped():
    moments = RunningMoments()
    scores = torch.tensor([1.0, 3.0, NAN, 8.0])
    moments.update(moment_sums(scores))
    deviation = math.sqrt(13)  # of 1 3 8: mean 4, (9 + 1 + 16) / 2
    close(shaped_scores(scores, moments), [1 / deviation, 3 / deviation, NAN, 8 / deviation], equal_nan=True)
    shifted = [-3 / deviation, -1 / deviation, NAN, 1.0]
    close(shaped_scores(scores, moments, shift_mean=True, clip=1.0), shifted, equal_nan=True)
    close(shaped_scores(scores, clip=2.0), [1.0, 2.0, NAN, 2.0], equal_nan=True)
    alone = RunningMoments()
    alone.update(moment_sums(torch.tensor([5.0])))
    close(shaped_scores(torch.tensor([5.0]), alone), [5.0])
    with pytest.raises(ValueError, match="none were given"):
        shaped_scores(scores, shift_mean=True)
    with pytest.raises(ValueError, match="bound of scores"):
        shaped_scores(scores, clip=0.0)


def test_rows_without_an_end_lose_the_penalty():
    close(penalise_missing_eos(torch.tensor([1.0, 2.0]), torch.tensor([1, 0]), 0.5), [1.0, 1.5])
    with pytest.raises(ValueError, match="missing ending token"):
        penalise_missing_eos(torch.zeros(1), torch.ones(1), -1.0)
