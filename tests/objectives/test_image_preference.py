"""mDPO's terms: numbers worked out by hand, what they push, and what is left out of them."""

import math

import pytest
import torch

from shared.objectives.image_preference import anchored, image_conditional, with_corrupted, with_image_terms
from shared.objectives.pair_losses import Pairs
from shared.objectives.preference import pair_objective


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def pairs_of_two():
    """u = 2, -1; v = 1, 1; beside the corrupted image 3, -2."""
    tokens = torch.tensor([2, 2])
    pairs = Pairs(numbers(-4.0, -6.0), numbers(-7.0, -2.0), tokens, tokens, numbers(-6.0, -5.0), numbers(-8.0, -3.0))
    return with_corrupted(pairs, numbers(-5.0, -9.0), numbers(-8.0, -7.0))


def nls(x):
    return math.log1p(math.exp(-x))


def test_the_chosen_answer_beside_its_image_and_beside_the_corrupted_one():
    found = image_conditional(pairs_of_two(), beta=0.5)
    assert found.tolist() == pytest.approx([nls(0.5 * (2 - 3)), nls(0.5 * (-1 + 2))])


def test_the_anchor_is_where_the_reward_should_be():
    assert anchored(pairs_of_two(), beta=0.5).tolist() == pytest.approx([nls(1.0), nls(-0.5)])
    assert anchored(pairs_of_two(), beta=0.5, anchor=0.25).tolist() == pytest.approx([nls(0.75), nls(-0.75)])


def test_the_terms_are_added_by_their_weights():
    plain = pair_objective(["sigmoid"], beta=0.5)
    pairs = pairs_of_two()
    losses = with_image_terms(plain, image_weight=2.0, anchor_weight=3.0, anchor=0.25)(pairs)
    expected = [nls(0.5 * 1) + 2 * nls(-0.5) + 3 * nls(0.75), nls(0.5 * -2) + 2 * nls(0.5) + 3 * nls(-0.75)]
    assert losses.per_pair.tolist() == pytest.approx(expected)
    assert list(losses.terms) == ["sigmoid", "image", "anchor"]
    assert losses.terms["image"].tolist() == pytest.approx([nls(-0.5), nls(0.5)])
    assert losses.chosen_rewards.tolist() == [1.0, -0.5]


def test_what_each_term_pushes():
    pairs = pairs_of_two()
    image_conditional(pairs, beta=0.5).sum().backward()
    assert (pairs.chosen.grad < 0).all() and (pairs.corrupted.grad > 0).all()
    assert torch.equal(pairs.chosen.grad, -pairs.corrupted.grad) and pairs.rejected.grad is None
    pairs = pairs_of_two()
    anchored(pairs, beta=0.5).sum().backward()
    assert (pairs.chosen.grad < 0).all() and pairs.corrupted.grad is None


def test_a_pair_without_image_has_no_image_term():
    pairs = pairs_of_two()
    pairs.shown = torch.tensor([False, True])
    found = image_conditional(pairs, beta=0.5)
    assert found.tolist() == pytest.approx([0.0, nls(0.5)])
    found.sum().backward()
    assert pairs.chosen.grad[0] == 0 and pairs.chosen.grad[1] != 0


def test_the_terms_see_log_ratios_whatever_the_divergence():
    objective = pair_objective(["sigmoid"], beta=0.5, f_divergence="js_divergence")
    found = with_image_terms(objective, image_weight=1.0)(pairs_of_two()).terms["image"]
    assert found.tolist() == pytest.approx([nls(-0.5), nls(0.5)])


def test_without_weights_the_objective_stays_what_it_is():
    plain = pair_objective(["sigmoid"])
    assert with_image_terms(plain) is plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_weight": -1.0}, "image_loss_weight"),
        ({"anchor_weight": math.inf}, "anchor_loss_weight"),
        ({"anchor_weight": 1.0, "anchor": math.nan}, "finite"),
        ({"anchor": 1.0}, "anchor_loss_weight"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        with_image_terms(pair_objective(["sigmoid"]), **options)
