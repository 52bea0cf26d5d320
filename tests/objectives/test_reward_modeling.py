import math

import pytest
import torch

from shared.objectives.reduce import reduce_tokens
from shared.objectives.reward_modeling import IGNORED, pair_reward_loss, step_loss

L3 = math.log(3)


def test_pair_loss_by_hand():
    chosen, rejected = torch.tensor([2 * L3, L3]), torch.tensor([L3, L3])
    # σ(ln 3) = 3/4, σ(0) = 1/2
    torch.testing.assert_close(pair_reward_loss(chosen, rejected), -torch.tensor([0.75, 0.5]).log())
    # a margin of ln 3: σ(0) and σ(-ln 3)
    margin = torch.tensor([L3, L3])
    torch.testing.assert_close(pair_reward_loss(chosen, rejected, margin_P=margin), -torch.tensor([0.5, 0.25]).log())
    # sums of 3 ln 3 and 2 ln 3
    centred = pair_reward_loss(chosen, rejected, center_coefficient=0.01)
    expected = -torch.tensor([0.75, 0.5]).log() + 0.01 * L3**2 * torch.tensor([9.0, 4.0])
    torch.testing.assert_close(centred, expected)


def test_pair_loss_gradients():
    chosen, rejected = torch.tensor([[0.5, -1.0], [0.2, 3.0]], dtype=torch.float64).unbind()
    chosen.requires_grad_(), rejected.requires_grad_()
    pair_reward_loss(chosen, rejected).sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    margin = torch.ones(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w, v: pair_reward_loss(w, v, margin_P=margin, center_coefficient=0.1), (chosen, rejected)
    )


def test_half_precision_is_widened():
    loss = pair_reward_loss(torch.tensor([8.0]).bfloat16(), torch.tensor([-8.0]).bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-16))]))
    far = pair_reward_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert far.tolist() == [2e4, 0.0]


def test_negative_centering_is_refused():
    with pytest.raises(ValueError, match="-0.1"):
        pair_reward_loss(torch.zeros(1), torch.zeros(1), center_coefficient=-0.1)


def test_step_loss_by_hand():
    # p(right) = 3/4, 1/4 and 1/2
    logits = torch.tensor([[[0.0, L3], [5.0, 9.0], [L3, 0.0]], [[1.0, 1.0], [math.inf, math.nan], [0.0, 0.0]]])
    labels = torch.tensor([[1, IGNORED, 1], [0, IGNORED, IGNORED]])
    expected = -torch.tensor([[0.75, 1, 0.25], [0.5, 1, 1]]).log()
    logits.requires_grad_()
    loss = step_loss(logits, labels)
    torch.testing.assert_close(loss.detach(), expected)
    total = reduce_tokens(loss, labels != IGNORED, mode="token")
    assert total.item() == pytest.approx(-math.log(0.75 * 0.25 * 0.5) / 3)
    total.backward()
    assert (logits.grad[labels == IGNORED] == 0).all()
    # towards the label: right twice, wrong once
    assert (logits.grad[labels == 1][:, 1] < 0).all() and (logits.grad[labels == 0][:, 1] > 0).all()


def test_steps_alone():
    # one row a step, as a trainer gathers them; labels as bool
    logits = torch.tensor([[0.0, L3], [0.0, L3]]).bfloat16()
    loss = step_loss(logits, torch.tensor([True, False]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -torch.tensor([0.75, 0.25]).log(), rtol=0.01, atol=0.01)


def test_steps_are_differentiable():
    logits = torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 1], [IGNORED, 0], [1, IGNORED]])
    assert torch.autograd.gradcheck(lambda x: step_loss(x, labels), logits)
