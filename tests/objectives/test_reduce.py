import math

import pytest
import torch

from shared.objectives.reduce import reduce_tokens, token_weights

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, math.nan]])
MASK = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]])  # rows count 2, 1 and 0 tokens


@pytest.mark.parametrize(
    ("mode", "denominator", "expected"),
    [
        ("token", None, (1 + 2 + 32) / 3),
        ("token", 10, (1 + 2 + 32) / 10),
        ("token", torch.tensor(10), (1 + 2 + 32) / 10),
        ("sequence", None, ((1 + 2) / 2 + 32) / 2),
        ("sequence", 3, ((1 + 2) / 2 + 32) / 3),
        ("sum", None, 1 + 2 + 32),
        ("fixed", 9, (1 + 2 + 32) / 9),
    ],
)
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()])
def test_by_hand(mode, denominator, expected, mask):
    assert reduce_tokens(VALUES, mask, mode=mode, denominator=denominator).item() == pytest.approx(expected)
    weights = token_weights(mask, mode=mode, denominator=denominator)
    assert weights.shape == mask.shape
    assert (weights * VALUES)[mask.bool()].sum().item() == pytest.approx(expected)


def test_gradient_is_the_weights_and_zero_where_masked():
    values = VALUES.clone().requires_grad_()
    reduce_tokens(values, MASK, mode="sequence").backward()
    assert values.grad.tolist() == [[0.25, 0.25, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("mode", "denominator"), [("token", None), ("sequence", None), ("token", torch.tensor(0))])
def test_no_counted_token_gives_zero(mode, denominator):
    values = VALUES.clone().requires_grad_()
    loss = reduce_tokens(values, torch.zeros_like(MASK), mode=mode, denominator=denominator)
    loss.backward()
    assert loss.item() == 0 and not values.grad.any()


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_micro_batches_add_up_under_one_denominator(mode):
    values = VALUES.nan_to_num()
    denominator = {"token": 3, "sequence": 2}[mode]
    parts = [reduce_tokens(values[i : i + 1], MASK[i : i + 1], mode=mode, denominator=denominator) for i in range(3)]
    assert sum(parts).item() == pytest.approx(reduce_tokens(values, MASK, mode=mode).item())


@pytest.mark.parametrize(
    ("mode", "denominator", "said"),
    [
        ("mean", None, "token, sequence, sum, fixed"),
        ("sum", 3, "takes no denominator"),
        ("fixed", None, "needs a denominator"),
        ("token", 0, "must be positive"),
    ],
)
def test_wrong_use_is_refused(mode, denominator, said):
    with pytest.raises(ValueError, match=said):
        reduce_tokens(VALUES, MASK, mode=mode, denominator=denominator)
