"""Advantages against hand-computed numbers."""

import math
from math import comb

import pytest
import torch

from shared.objectives.advantages import (
    gdpo_advantages,
    group_advantages,
    importance_correction,
    leave_one_out,
    pass_at_k,
    top_entropy,
    weighted_rewards,
    zero_std_groups,
)

NAN = math.nan


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_rewards_that_apply_are_weighted_and_summed():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    found = weighted_rewards(rewards, torch.tensor([0.5, 2.0]))
    assert found[:2].tolist() == [4.5, 4.0] and found[2].isnan()
    measured = weighted_rewards(rewards, torch.tensor([0.5, 0.0]))
    assert measured[0] == 0.5 and measured[1:].isnan().all(), "what is only measured makes no reward"


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # groups 1 3 and 2 6: deviations √2 and √8, of the batch √(14/3)
        ("group", [-1 / math.sqrt(2), 1 / math.sqrt(2), -2 / math.sqrt(8), 2 / math.sqrt(8)]),
        ("batch", [-1 / math.sqrt(14 / 3), 1 / math.sqrt(14 / 3), -2 / math.sqrt(14 / 3), 2 / math.sqrt(14 / 3)]),
        ("none", [-1.0, 1.0, -2.0, 2.0]),
    ],
)
def test_group_advantages_by_hand(scale, expected):
    close(group_advantages(torch.tensor([1.0, 3.0, 2.0, 6.0]), 2, scale=scale, eps=0.0), expected)


def test_the_divisor_has_eps_added():
    close(group_advantages(torch.tensor([0.0, 2.0]), 2, eps=1.0), [-1 / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2))])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rows_without_a_reward_get_no_advantage_and_move_no_other(scale):
    rewards = torch.tensor([1.0, NAN, 3.0, NAN, NAN, NAN, 7.0, NAN, NAN])
    found = group_advantages(rewards, 3, scale=scale)
    assert found[0] < 0 < found[2] and found[0] == -found[2]
    assert found[[1, 3, 4, 5, 6, 7, 8]].tolist() == [0.0] * 7
    pair = group_advantages(torch.tensor([1.0, 3.0]), 2, scale=scale)
    if scale != "batch":
        assert torch.equal(pair, found[[0, 2]])
    assert leave_one_out(rewards, 3).tolist() == [-2.0, 0.0, 2.0] + [0.0] * 6


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_and_equal_rewards_teach_nothing(scale):
    assert group_advantages(torch.tensor([1.0, 5.0]), 1, scale=scale).tolist() == [0, 0]
    # 0.1 is no binary fraction: the mean of seven is not quite it
    assert not group_advantages(torch.full((14,), 0.1), 7, scale=scale).any()
    assert not group_advantages(torch.full((4,), NAN), 2, scale=scale).any()
    assert leave_one_out(torch.tensor([1.0, 5.0]), 1, normalize=True).tolist() == [0, 0]


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    close(leave_one_out(rewards, 3), expected)
    deviation = math.sqrt(sum(x * x for x in expected) / 5)
    close(leave_one_out(rewards, 3, normalize=True, eps=0.0), [x / deviation for x in expected])


def test_gdpo_by_hand():
    # reward 0: groups (0, 2), (0, 0); reward 1: (0, 100), (100, 0): ±1/√2 each, or 0
    rewards = torch.tensor([[0.0, 0.0], [2.0, 100.0], [0.0, 100.0], [0.0, 0.0]])
    total = [-3.0, 3.0, 1.0, -1.0]  # times 1/√2: 2 · reward 0 + reward 1
    deviation = math.sqrt(20 / 3)
    found = gdpo_advantages(rewards, torch.tensor([2.0, 1.0]), 2, eps=1e-9)
    close(found, [x / deviation for x in total])
    with_gap = gdpo_advantages(torch.tensor([[0.0, NAN], [2.0, NAN], [NAN, NAN]]), torch.ones(2), 3)
    assert with_gap[0] == -with_gap[1] and with_gap[2] == 0


def test_groups_that_teach_nothing():
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, NAN, NAN, 3.0, NAN, 1.0, NAN])
    assert zero_std_groups(rewards, 2).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[3.0, 0.5, 1.0, 0.0], [2.0, 2.0, 0.0, 0.0]]),
        ("token_mask", [[0.0, 0.5, 1.0, 0.0], [2.0, 2.0, 0.0, 0.0]]),
        ("sequence_truncate", [[2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 0.0, 0.0]]),
        ("sequence_mask", [[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_corrections_by_hand(mode, expected):
    old = torch.tensor([[4.0, 0.5, 1.0, 9.0], [2.0, 2.0, 9.0, 9.0]]).log()
    sampler = torch.tensor([[0.0, 0.0, NAN, NAN], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    close(importance_correction(old, sampler, mask, mode=mode, cap=3.0), expected)


def test_a_corrections_floor():
    old, sampler, mask = torch.tensor([[0.5, 1.0]]).log(), torch.zeros(1, 2), torch.ones(1, 2)
    close(importance_correction(old, sampler, mask, mode="token_truncate", cap=None, floor=0.8), [[0.8, 1.0]])
    close(importance_correction(old, sampler, mask, mode="token_mask", cap=None, floor=0.8), [[0.0, 1.0]])
    for bounds in ({"cap": 1.0, "floor": 2.0}, {"cap": 0.0}, {"cap": None, "floor": -1.0}):
        with pytest.raises(ValueError, match="floor < cap"):
            importance_correction(old, sampler, mask, mode="token_mask", **bounds)
    with pytest.raises(ValueError, match="Unknown correction"):
        importance_correction(old, sampler, mask, mode="truncate", cap=1.0)


def test_the_highest_entropies_are_kept():
    entropy = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.3, 8.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert top_entropy(entropy, mask, 0.5).tolist() == [[False, True, True], [True, False, False]]
    assert top_entropy(entropy, mask, 1.0).tolist() == mask.bool().tolist()
    assert top_entropy(entropy, mask, 0.0).sum() == 1
    assert top_entropy(entropy, mask, 0.5, everywhere=torch.tensor([9.0, 9.0, 9.0])).sum() == 0
    assert not top_entropy(entropy, torch.zeros(2, 3), 0.5).any()
    for share in (0.1, 0.37, 0.8):
        bound = torch.quantile(entropy[mask.bool()], 1 - share)
        assert torch.equal(top_entropy(entropy, mask, share), (entropy >= bound) & mask.bool())
    with pytest.raises(ValueError, match="must be in"):
        top_entropy(entropy, mask, 1.1)


def test_pass_at_k_by_hand():
    correct = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    for k in range(1, 5):
        expected = sum(1 - comb(4 - c, k) / comb(4, k) for c in (1, 2, 0, 4)) / 4
        assert pass_at_k(correct, k).item() == pytest.approx(expected)
    for k in (0, 5):
        with pytest.raises(ValueError, match="1 <= k <= 4"):
            pass_at_k(correct, k)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out, zero_std_groups])
def test_wrong_rewards_are_refused(function):
    with pytest.raises(ValueError, match="not whole groups of 2"):
        function(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="must be finite"):
        function(torch.tensor([1.0, math.inf]), 2)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="Unknown scale 'std'"):
        group_advantages(torch.zeros(2), 2, scale="std")
