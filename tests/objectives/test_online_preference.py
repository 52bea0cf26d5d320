"""Online DPO's pairs, XPO and Nash-MD against hand-computed numbers."""

import itertools
import math

import pytest
import torch

from shared.objectives.online_preference import Answers, judged_pairs, nash_md_losses, xpo_losses
from shared.objectives.pair_losses import paired_loss

LN2, LN3 = math.log(2), math.log(3)


def answers(logp, ref, tokens=1.0):
    logp = torch.tensor(logp)
    return Answers(logp.requires_grad_(), torch.tensor(ref), torch.full_like(logp, tokens))


def test_the_judge_says_which_one_is_chosen():
    pairs = judged_pairs(
        answers([1.0, 2.0], [3.0, 4.0], 9), answers([5.0, 6.0], [7.0, 8.0], 2), torch.tensor([True, False])
    )
    assert pairs.chosen.tolist() == [1, 6] and pairs.rejected.tolist() == [5, 2]
    assert pairs.ref_chosen.tolist() == [3, 8] and pairs.ref_rejected.tolist() == [7, 4]
    assert pairs.chosen_tokens.tolist() == [9, 2] and pairs.rejected_tokens.tolist() == [2, 9]
    one = Answers(torch.zeros(1), None, torch.ones(1))
    assert judged_pairs(one, one, torch.ones(1)).ref_chosen is None
    with pytest.raises(ValueError, match="or neither"):
        judged_pairs(one, answers([0.0], [0.0]), torch.ones(1))


def test_xpo_by_hand():
    # own log-ratio ln 3, the other's 0, β = 1: log σ(±ln 3) is ln ¾ or ln ¼; α log π(y_ref) = ½ · -2
    own, other = answers([LN3 - 4, LN3 - 4], [-4.0, -4.0]), answers([-2.0, -2.0], [-2.0, -2.0])
    loss = paired_loss("sigmoid", beta=1.0)
    found = xpo_losses(own, other, torch.tensor([True, False]), loss, alpha=0.5)
    torch.testing.assert_close(found.detach(), torch.tensor([-math.log(0.75) - 1, -math.log(0.25) - 1]))
    found.sum().backward()
    # slopes of -log σ(±d): ∓¼ and ±¾; α on the reference's completion besides
    torch.testing.assert_close(own.logp.grad, torch.tensor([-0.25, 0.75]))
    torch.testing.assert_close(other.logp.grad, torch.tensor([0.25 + 0.5, -0.75 + 0.5]))
    without = xpo_losses(own, other, torch.tensor([True, False]), loss, alpha=0.0)
    torch.testing.assert_close(without, loss(judged_pairs(own, other, torch.tensor([True, False]))))
    with pytest.raises(ValueError, match="alpha"):
        xpo_losses(own, other, torch.ones(2), loss, alpha=-1.0)


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        # r = 1, -.5, 2; P - ½ = .3; β = .1: slopes .1 k - .3
        ("token", [[-0.2, -0.35, -0.1, 0.0]]),
        ("future", [[-0.05, -0.15, -0.1, 0.0]]),
    ],
)
def test_nash_md_by_hand(credit, expected):
    logp = torch.tensor([[-1.0, -2.0, -3.0, math.nan]], requires_grad=True)
    ref, mask = torch.tensor([[-2.0, -1.5, -5.0, math.nan]]), torch.tensor([[1, 1, 1, 0]])
    losses = nash_md_losses(logp, ref, mask, torch.tensor([0.8]), beta=0.1, credit=credit)
    losses.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor(expected))
    torch.testing.assert_close(losses.detach(), torch.tensor([(logp * torch.tensor(expected))[0, :3].sum().item()]))


def test_nash_mds_gradient_is_on_average_that_of_preference_and_divergence():
    """Two tokens out of two: all four completions, each weighted by its probability."""
    first = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.5, 0.1], [-0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    preference = torch.tensor([[0.9, 0.2], [0.6, 0.1]], dtype=torch.float64)
    ref = torch.tensor([[-0.5, -0.9], [-0.7, -0.7], [-1.1, -0.4]], dtype=torch.float64).log_softmax(-1)
    logp = torch.stack([first, *second]).log_softmax(-1)
    completions = list(itertools.product(range(2), repeat=2))
    tokens = torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in completions])
    known = torch.stack([torch.stack([ref[0, a], ref[1 + a, b]]) for a, b in completions])
    chance = tokens.sum(1).exp()
    exact = (chance * (0.2 * (tokens - known).sum(1) - preference.flatten())).sum()
    sampled = nash_md_losses(tokens, known, torch.ones(4, 2), preference.flatten(), beta=0.2)
    expected = torch.autograd.grad(exact, (first, second), retain_graph=True)
    found = torch.autograd.grad((chance.detach() * sampled).sum(), (first, second))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_nash_md_refuses_wrong_options():
    arguments = torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)
    with pytest.raises(ValueError, match="Unknown credit"):
        nash_md_losses(*arguments, credit="row")
    with pytest.raises(ValueError, match="beta"):
        nash_md_losses(*arguments, beta=-1.0)
