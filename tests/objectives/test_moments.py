"""Sums, whitening and running moments against hand-computed numbers, cut in any way."""

import math
from dataclasses import asdict

import pytest
import torch

from shared.objectives.moments import RunningMoments, mean_and_variance, moment_sums, whiten

NAN = math.nan
VALUES = torch.tensor([[1.0, 3.0, 9.0], [8.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_sums_by_hand():
    # 1 3 8: mean 4, variance (9 + 1 + 16) / 2
    sums = moment_sums(VALUES, MASK)
    assert sums.tolist() == [3.0, 12.0, 74.0]
    mean, variance = mean_and_variance(sums)
    assert (mean.item(), variance.item()) == (4.0, 13.0)
    assert moment_sums(torch.tensor([1.0, NAN, 3.0])).tolist() == [2.0, 4.0, 10.0]


def test_whitening_by_hand():
    deviation = math.sqrt(13)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [4.0, 0.0, 0.0]]) / deviation
    torch.testing.assert_close(whiten(VALUES, MASK), expected)
    unshifted = (expected + 4) * MASK  # the mean comes back, but not to what does not count
    torch.testing.assert_close(whiten(VALUES, MASK, shift_mean=False), unshifted)


def test_whitening_over_processes_is_that_of_all_values_together():
    whole = whiten(VALUES, MASK)
    sums = sum(moment_sums(v, m) for v, m in zip(VALUES, MASK, strict=True))
    for row in range(2):
        torch.testing.assert_close(whiten(VALUES[row], MASK[row], sums), whole[row])


def test_whitening_of_little_gives_zeros():
    assert not whiten(VALUES, torch.zeros(2, 3)).any()
    assert not whiten(VALUES, torch.tensor([[1, 0, 0], [0, 0, 0]])).any()
    assert whiten(torch.full((1, 7), 0.1), torch.ones(1, 7)).abs().max() < 1e-6
    spoilt = torch.tensor([1.0, 3.0, 8.0, NAN])
    assert whiten(spoilt, torch.tensor([1, 1, 1, 0])).isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("cut", [[12], [1, 11], [5, 0, 4, 3], [1] * 12])
def test_running_moments_do_not_depend_on_the_batches(offset, cut):
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)) + offset
    moments = RunningMoments()
    for batch in values.split(cut):
        moments.update(moment_sums(batch))
        moments = RunningMoments(**asdict(moments))
    assert moments.count == 12
    assert moments.mean == pytest.approx(values.double().mean().item())
    assert moments.std == pytest.approx(values.double().std().item())


def test_running_moments_of_little_and_of_broken_values():
    moments = RunningMoments()
    moments.update(moment_sums(torch.tensor([NAN])))
    assert (moments.count, moments.std) == (0, 0)
    moments.update(moment_sums(torch.tensor([2.0])))
    assert (moments.mean, moments.std) == (2.0, 0.0)
    with pytest.raises(ValueError, match="finite values"):
        moments.update(moment_sums(torch.tensor([math.inf])))
