"""How unlike samples are: by hand, relative to the start, and what saturated pixels count."""

import math

import pytest
import torch

from diffusionalign.diversity import Diversity, mean_distance, thumbnails


def test_the_distance_is_the_mean_over_pairs():
    """Roots of mean squares: |0 - 1| = 1, |0 - .5| = .5, |1 - .5| = .5."""
    values = torch.tensor([0.0, 1.0, 0.5])[:, None].expand(3, 12)
    assert mean_distance(values) == pytest.approx(2 / 3)
    assert math.isnan(mean_distance(values[:1]))


def test_thumbnails_are_of_one_size_and_of_what_is_seen():
    images = [torch.full((3, 32, 48), 3.0), torch.full((3, 16, 16), 1.0), torch.full((3, 8, 8), -1.0)]
    small = thumbnails(images)
    assert small.shape == (3, 3 * 16 * 16)
    assert torch.equal(small[0], small[1]), "brighter than white is white"
    assert mean_distance(small) == pytest.approx(2 / 3)
    fine = torch.zeros(2, 3, 64, 64)
    fine[0, :, ::2, ::2], fine[1, :, 1::2, 1::2] = 1, 1
    assert mean_distance(thumbnails(fine)) == pytest.approx(0, abs=1e-6), "noise of single pixels is no diversity"


def test_it_falls_when_all_samples_become_alike():
    diversity, generator = Diversity(), torch.Generator().manual_seed(0)
    start = [diversity(torch.rand(8, 12, generator=generator)) for _ in range(6)]
    assert start[0] == 1 and all(value == pytest.approx(1, abs=0.2) for value in start)
    assert len(diversity.start) == 3, "the start does not move on"
    assert diversity(0.1 * torch.rand(8, 12, generator=generator)) == pytest.approx(0.1, abs=0.03)
    assert diversity(torch.ones(8, 12)) == 0
    assert math.isnan(diversity(torch.ones(1, 12)))
    assert Diversity()(torch.ones(8, 12)) == 1, "what was alike from the start has not fallen"
