"""Policy-gradient losses against hand-computed numbers, and the path by actions against the path by rows."""

import itertools
import math

import pytest
import torch

from shared.objectives.advantages import group_advantages
from shared.objectives.policy_gradient import PolicyGradient
from shared.objectives.policy_losses import LOSSES

LN2 = math.log(2)
IMPORTANCES = ("token", "sequence", "sequence_sum")
COMBINATIONS = [
    (loss, importance)
    for loss, importance in itertools.product(LOSSES, IMPORTANCES)
    if loss != "vespo" or importance == "token"
]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def make(loss_type="grpo", **options):
    return PolicyGradient(loss_type, max_actions=6 if loss_type == "dr_grpo" else None, **options)


def rows(seed=0, b=4, t=6):
    """Log-probabilities, old ones, advantages, mask and reference; one row counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(b, t, generator=generator, dtype=torch.float64)
    old, ref = (logp + 0.4 * torch.randn(b, t, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(t) < torch.tensor([6, 2, 0, 4])[:b, None]
    mask[0, 2] = False
    return logp.requires_grad_(), old, torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)[:b], mask, ref


def step_weights(objective, mask):
    return objective.weights(mask, rows=torch.tensor(len(mask)), actions=mask.sum())


# Ratios 2, 1/2 and 1.1 with ε = 0.2, ε_h = 0.3.
@pytest.mark.parametrize(
    ("loss_type", "options", "advantage", "expected"),
    [
        ("grpo", {}, 1.0, [-1.3, -0.5, -1.1]),
        ("grpo", {}, -1.0, [2.0, 0.8, 1.1]),
        ("grpo", {"epsilon_high": None}, 1.0, [-1.2, -0.5, -1.1]),
        ("dapo", {"delta": 1.5}, -1.0, [1.5, 0.8, 1.1]),
        ("cispo", {"epsilon_high": 1.5}, 2.0, [1.5 * 2, 0.5 * 2, 1.1 * 2]),  # logp is -1
        ("cispo", {"epsilon_high": None}, -1.0, [-2.0, -0.5, -1.1]),
        ("sapo", {"sapo_temperature_pos": 2.0}, 1.0, [-2 * sigmoid(2), -2 * sigmoid(-1), -2 * sigmoid(0.2)]),
        ("sapo", {"sapo_temperature_neg": 1.0}, -1.0, [4 * sigmoid(1), 4 * sigmoid(-0.5), 4 * sigmoid(0.1)]),
        # e^(λ + kS - λe^S) with k, λ = 2, 3 and 3, 2
        ("vespo", {}, 1.0, [math.exp(-3) * 4, math.exp(1.5) / 4, math.exp(-0.3) * 1.21]),
        ("vespo", {}, -1.0, [-math.exp(-2) * 8, -math.exp(1) / 8, -math.exp(-0.2) * 1.331]),
    ],
)  # fmt: skip
def test_single_actions_by_hand(loss_type, options, advantage, expected):
    objective = make(loss_type, **{"epsilon_high": 0.3, **options})
    ratio = torch.tensor([2.0, 0.5, 1.1])
    logp = -torch.ones(3)
    losses = objective.action_losses(logp, logp - ratio.log(), torch.full((3,), advantage))
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_rows_by_hand():
    # log-ratios 3 ln 2, -ln 2 and a masked place: mean ln 2, sum 2 ln 2
    old = torch.tensor([[-3 * LN2, LN2, 9.0]])
    mask = torch.tensor([[1, 1, 0]])
    arguments = (torch.zeros(1, 3), old, torch.tensor([-1.0]), mask)
    for importance, expected in (("token", [8.0, 0.8]), ("sequence", [2.0, 2.0]), ("sequence_sum", [4.0, 4.0])):
        losses = make(importance=importance).row_losses(*arguments)
        torch.testing.assert_close(losses, torch.tensor([[*expected, 0.0]]))
    # vespo: S = 2 ln 2, k 3, λ 2
    losses = make("vespo").row_losses(arguments[0] - 1, old - 1, *arguments[2:])
    torch.testing.assert_close(losses, -torch.tensor([[1.0, 1.0, 0.0]]) * math.exp(2 - 8) * 4**3)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [[1 / 4, 1 / 4], [1 / 2, 0]]),
        ("sapo", [[1 / 4, 1 / 4], [1 / 2, 0]]),
        ("bnpo", [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("dapo", [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("cispo", [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("vespo", [[1 / 3, 1 / 3], [1 / 3, 0]]),
        ("dr_grpo", [[1 / 12, 1 / 12], [1 / 12, 0]]),
        ("luspo", [[1 / 2, 1 / 2], [1 / 2, 0]]),
    ],
)
def test_weights_by_hand(loss_type, expected):
    mask = torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(step_weights(make(loss_type), mask), torch.tensor(expected))


def test_rloo_is_the_mean_over_rows_of_the_clipped_row_loss():
    objective = make(importance="sequence_sum", epsilon=0.2)
    logp, old, advantages, mask, _ = rows()
    ratio = ((logp - old) * mask).sum(1).exp()
    by_row = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    by_row = by_row * mask.any(1)  # a row without an action has no loss
    loss = (step_weights(objective, mask) * objective.row_losses(logp, old, advantages, mask)).sum()
    torch.testing.assert_close(loss, by_row.mean())


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [LN2, -LN2]), ("k2", [LN2**2 / 2] * 2), ("k3", [LN2 - 0.5, 1 - LN2])]
)
@pytest.mark.parametrize("corrected", [False, True])
def test_kl_by_hand(estimator, expected, corrected):
    objective = make(beta=0.5, kl_estimator=estimator, bias_corrected_kl=corrected)
    logp, ref = torch.zeros(2), torch.tensor([-LN2, LN2])
    losses = objective.action_losses(logp, logp - math.log(3), torch.zeros(2), ref=ref)
    torch.testing.assert_close(losses, 0.5 * torch.tensor(expected) * (3 if corrected else 1))


def test_only_a_corrected_kl_has_the_divergences_own_gradient():
    # the average of the estimates' gradients over all actions of a softmax, against autograd through the divergence
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    for estimator, corrected, right in (("k1", True, True), ("k3", True, True), ("k2", False, True),
                                        ("k1", False, False), ("k3", False, False)):  # fmt: skip
        objective = make(beta=1.0, kl_estimator=estimator, bias_corrected_kl=corrected)
        losses = objective.action_losses(logp, None, torch.zeros(3), ref=ref)
        (found,) = torch.autograd.grad((logp.detach().exp() * losses).sum(), logits, retain_graph=True)
        assert torch.allclose(found, exact) == right


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
def test_a_good_action_becomes_likelier_and_a_bad_one_less(loss_type, importance):
    objective = make(loss_type, importance=importance)
    logp, _, advantages, mask, _ = rows()
    losses = objective.row_losses(logp, None, advantages, mask)
    (gradient,) = torch.autograd.grad((step_weights(objective, mask) * losses).sum(), logp)
    assert torch.equal(gradient.sign(), -advantages.sign()[:, None] * mask)


def gradients(objective, arguments, old):
    """Of the step's loss by logp: by rows, and action by action."""
    logp, _, advantages, mask, ref = arguments
    weights = step_weights(objective, mask)
    by_rows = (weights * objective.row_losses(logp, old, advantages, mask, ref=ref)).sum()
    flat, of = mask.nonzero(as_tuple=True), (lambda values: None if values is None else values[mask])
    actions = objective.action_losses(logp[mask], of(old), advantages[flat[0]], ref=of(ref))
    if old is None:
        weights = objective.on_policy_weights(weights, mask)
    by_actions = (weights[mask] * actions).sum()
    return [torch.autograd.grad(loss, logp)[0] for loss in (by_rows, by_actions)]


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
@pytest.mark.parametrize("kl", [None, False, True])
def test_on_policy_the_actions_give_the_gradient_of_the_rows(loss_type, importance, kl):
    objective = make(loss_type, importance=importance, beta=0.0 if kl is None else 0.3, bias_corrected_kl=bool(kl))
    assert objective.separable(True) == (importance == "token" or kl is None)
    if objective.separable(True):
        by_rows, by_actions = gradients(objective, rows(), None)
        assert by_rows.any()
        torch.testing.assert_close(by_actions, by_rows)


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_off_policy_the_actions_give_the_gradient_of_the_rows_where_they_may(loss_type, importance, beta):
    objective = make(loss_type, importance=importance, beta=beta, bias_corrected_kl=True, delta=None)
    arguments = rows()
    by_rows, by_actions = gradients(objective, arguments, arguments[1])
    assert objective.separable(False) == (importance == "token" and loss_type != "vespo")
    assert torch.allclose(by_actions, by_rows, rtol=1e-6) == objective.separable(False)


@pytest.mark.parametrize("importance", ["sequence", "sequence_sum"])
def test_weights_that_differ_within_a_row_are_folded_for_its_ratio(importance):
    objective = make(importance=importance)
    logp, _, advantages, mask, _ = rows()
    weights = step_weights(objective, mask) * torch.linspace(0.5, 2, 6)
    by_rows = (weights * objective.row_losses(logp, None, advantages, mask)).sum()
    folded = objective.on_policy_weights(weights, mask)
    by_actions = (folded * objective.action_losses(logp, None, advantages[:, None])).sum()
    torch.testing.assert_close(*[torch.autograd.grad(loss, logp)[0] for loss in (by_actions, by_rows)])


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
def test_what_stands_at_masked_places_is_not_looked_at(loss_type, importance):
    objective = make(loss_type, importance=importance, beta=0.1, bias_corrected_kl=True)
    logp, old, advantages, mask, ref = rows()
    expected = objective.row_losses(logp, old, advantages, mask, ref=ref)
    weights = step_weights(objective, mask)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), logp)
    spoilt = [t.detach().masked_fill(~mask, bad) for t, bad in ((logp, 1e30), (old, torch.nan), (ref, -torch.inf))]
    spoilt[0].requires_grad_()
    found = objective.row_losses(spoilt[0], spoilt[1], advantages, mask, ref=spoilt[2])
    assert torch.equal(found, expected) and not found[~mask].any()
    assert torch.equal(torch.autograd.grad((weights * found).sum(), spoilt[0])[0], gradient)
    metrics = objective.metrics(spoilt[0], spoilt[1], advantages, mask, spoilt[2])
    assert metrics == objective.metrics(logp, old, advantages, mask, ref)


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_wild_ratios_stay_finite(loss_type, importance, shift):
    objective = make(loss_type, importance=importance, beta=0.1, bias_corrected_kl=True)
    logp, old, advantages, mask, ref = (t.float() if t.is_floating_point() else t for t in rows())
    logp = logp.detach().requires_grad_()
    losses = objective.row_losses(logp, old + shift, advantages, mask, ref=ref - shift)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(("loss_type", "importance"), COMBINATIONS)
def test_the_cut_into_micro_batches_does_not_matter(loss_type, importance):
    objective = make(loss_type, importance=importance, beta=0.2)
    logp, old, advantages, mask, ref = rows()

    def step(pieces):
        total = 0.0
        for i in pieces:
            weights = objective.weights(mask[i], rows=4, actions=mask.sum())
            total = total + (weights * objective.row_losses(logp[i], old[i], advantages[i], mask[i], ref=ref[i])).sum()
        return total, torch.autograd.grad(total, logp)[0]

    torch.testing.assert_close(step([slice(4)]), step([slice(1), slice(1, 3), slice(3, 4)]))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_factor_on_the_policy_term_may_stand_on_the_advantages(loss_type):
    objective = make(loss_type)
    logp, old, advantages, mask, _ = rows()
    factor = torch.linspace(0, 2, 24, dtype=torch.float64).view(4, 6)
    found = objective.row_losses(logp, old, advantages[:, None] * factor, mask)
    torch.testing.assert_close(found, factor * objective.row_losses(logp, old, advantages, mask))


def test_metrics_by_hand():
    ratio = torch.tensor([[0.5, 2.0, 1.0], [2.0, 0.5, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([-1.0, 1.0])
    logp = torch.zeros(2, 3, dtype=torch.float64)

    def means(objective, ref=None):
        return {
            k: (s / n).item() for k, (s, n) in objective.metrics(logp, -ratio.log(), advantages, mask, ref).items()
        }

    clipped = {"clip_ratio/low_mean": 1 / 5, "clip_ratio/high_mean": 1 / 5, "clip_ratio/region_mean": 2 / 5}
    assert means(make(epsilon_high=0.3)) == pytest.approx({"ratio/mean": 6 / 5, **clipped})
    # one ratio a row: 1 and 1
    assert means(make(importance="sequence"))["clip_ratio/region_mean"] == 0
    assert means(make("cispo", epsilon_high=1.5))["cispo_clip_ratio"] == pytest.approx(1 / 5)
    assert means(make("vespo"))["vespo/phi_seq_mean"] == pytest.approx(1)
    ref = torch.full((2, 3), LN2, dtype=torch.float64)
    assert means(make(beta=0.1, kl_estimator="k1"), ref)["kl"] == pytest.approx(-LN2)
    assert means(make(beta=0.1, kl_estimator="k1", bias_corrected_kl=True), ref)["kl"] == pytest.approx(-LN2 * 6 / 5)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
def test_metrics_of_a_flat_list_are_those_of_the_grid(loss_type):
    objective = make(loss_type, beta=0.1)
    logp, old, advantages, mask, ref = rows()
    row = mask.nonzero()[:, 0]
    flat = objective.metrics(logp[mask], old[mask], advantages[row], torch.ones(len(row)), ref[mask])
    torch.testing.assert_close(flat, objective.metrics(logp, old, advantages, mask, ref))


def test_on_policy_nothing_is_clipped():
    logp, _, advantages, mask, _ = rows()
    for loss_type, importance in COMBINATIONS:
        found = make(loss_type, importance=importance).metrics(logp, None, advantages, mask)
        assert all(total == (count if name in ("ratio/mean", "vespo/phi_seq_mean") else 0)
                   for name, (total, count) in found.items())  # fmt: skip


def test_a_softmax_learns_the_rewarded_choice():
    logits = torch.zeros(3, requires_grad=True)
    objective = make(epsilon=0.2)
    choices = torch.tensor([0, 1, 2])
    advantages = group_advantages(torch.tensor([0.0, 1.0, 0.0]), 3)
    old = logits.detach().log_softmax(0)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(20):
        losses = objective.row_losses(
            logits.log_softmax(0)[choices][:, None], old[:, None], advantages, torch.ones(3, 1)
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    ratio = (logits.detach().log_softmax(0) - old).exp()
    assert ratio[1] > 1.2 and ratio[1] < 1.6  # the clip stops it soon after 1 + ε


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grop"}, "Did you mean 'grpo'"),
        ({"importance": "tokens"}, "importance level 'tokens'"),
        ({"kl_estimator": "k4"}, "KL estimator 'k4'"),
        ({"epsilon": -0.1}, "epsilon must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"delta": 1.0}, "delta must be"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be"),
        ({"vespo_lambda_neg": 0.0}, "vespo_lambda_neg must be"),
        ({"loss_type": "cispo", "delta": 2.0}, "leave it out with 'cispo'"),
        ({"loss_type": "vespo", "importance": "sequence"}, "does not go with it"),
        ({"loss_type": "dr_grpo"}, "needs max_actions"),
        ({"loss_type": "dr_grpo", "max_actions": 0}, "max_actions must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**options)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="reference's log-probabilities are needed"):
        make(beta=0.1).action_losses(torch.zeros(2), None, torch.ones(2))
