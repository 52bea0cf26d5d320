import math
from functools import partial

import pytest
import torch

from shared.objectives.divergence import CAP, DIVERGENCES, divergence
from shared.objectives.pair_losses import PAIRED, REFERENCE_FREE, Pairs, log_odds_ratio, paired_loss
from shared.objectives.preference import (
    cpo_objective,
    ld_weights,
    orpo_objective,
    pair_objective,
    pairs_of,
    wpo_weights,
)

L3 = math.log(3)
EPSILON = {"exo_pair": 0.1, "robust": 0.1}
SMOOTH = [name for name in PAIRED if name != "hinge"]


def one_pair(u=L3, v=-L3, dtype=torch.float64):
    """Over a reference at -5 and -9, with 2 and 4 tokens. By default σ(u) = 3/4, σ(v) = 1/4, σ(u - v) = 9/10."""
    number = partial(torch.tensor, dtype=dtype)
    return Pairs(
        number([u - 5.0]), number([v - 9.0]), torch.tensor([2]), torch.tensor([4]), number([-5.0]), number([-9.0])
    )


def many_pairs(pairs=6, *, reference=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = -10 * torch.rand(4, pairs, generator=draw, dtype=torch.float64)
    counts = torch.randint(1, 9, (2, pairs), generator=draw)
    references = (ref_chosen, ref_rejected) if reference else (None, None)
    return Pairs(chosen.requires_grad_(), rejected.requires_grad_(), *counts, *references)


def log(x):
    return math.log(x)


# by hand, from σ(u) = 3/4, σ(v) = 1/4, σ(d) = 9/10, d = ln 9 and u/n_w - v/n_l = ln 3 / 2 + ln 3 / 4 = ¾ ln 3
BY_HAND = [
    ("sigmoid", {}, -log(0.9)),
    ("sigmoid", {"label_smoothing": 0.1}, -0.9 * log(0.9) - 0.1 * log(0.1)),
    ("sigmoid", {"beta": 0.5}, -log(0.75)),  # σ(½ ln 9) = σ(ln 3)
    ("hinge", {}, 0.0),  # 1 - ln 9 < 0
    ("hinge", {"beta": 0.25}, 1 - 0.25 * log(9)),
    ("ipo", {}, (0.75 * L3 - 0.5) ** 2),
    ("ipo", {"beta": 0.25}, (0.75 * L3 - 2) ** 2),
    ("sigmoid_norm", {}, log(1 + 3**-0.75)),  # -log σ(x) = log(1 + e^-x)
    ("exo_pair", {"label_smoothing": 0.1}, 0.0),  # the policy's preference is the smoothed label itself
    ("exo_pair", {"label_smoothing": 0.2}, 0.9 * log(0.9 / 0.8) + 0.1 * log(0.1 / 0.2)),
    ("nca_pair", {}, -log(0.75) - 0.5 * log(0.25) - 0.5 * log(0.75)),
    ("bco_pair", {}, -2 * log(0.75)),
    ("robust", {"label_smoothing": 0.1}, (-0.9 * log(0.9) + 0.1 * log(0.1)) / 0.8),
    ("robust", {}, -log(0.9)),
    ("sppo_hard", {}, 2 * (L3 - 0.5) ** 2),
    ("aot", {}, -log(0.9)),  # one pair is its own order
    ("aot_unpaired", {"label_smoothing": 0.1}, -0.9 * log(0.9) - 0.1 * log(0.1)),
    ("apo_zero", {}, 0.25 + 0.25),
    ("apo_down", {}, 0.75 + 0.1),
    ("discopop", {"discopop_tau": 1.0}, -log(0.9) * 0.1 + 0.9 / 9),
    ("discopop", {"discopop_tau": 0.5}, -log(0.9) / 82 + 81 / 82 / 9),  # σ(2 ln 9) = 81/82
    ("sft", {}, 5 - L3),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_losses_by_hand(name, options, expected):
    loss = paired_loss(name, **{"beta": 1.0, **options})(one_pair())
    assert loss.shape == (1,) and loss.item() == pytest.approx(expected, abs=1e-12)


def test_sorted_losses_by_hand():
    # margins of the policy 1, 4, of the reference 3, 0; log-ratios u = 2, 1 and v = 4, -3
    pairs = Pairs(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-2.0, -6.0]),
        *torch.ones(2, 2),
        torch.tensor([-3.0, -3.0]),
        torch.tensor([-6.0, -3.0]),
    )
    # sorted 1, 4 - 0, 3; in pairs it would be 1 - 3 and 4 - 0
    aot = -torch.nn.functional.logsigmoid(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(paired_loss("aot", beta=1.0)(pairs), aot)
    # sorted 1, 2 minus -3, 4
    unpaired = -torch.nn.functional.logsigmoid(torch.tensor([4.0, -2.0]))
    torch.testing.assert_close(paired_loss("aot_unpaired", beta=1.0)(pairs), unpaired)


def test_reference_free_losses_by_hand():
    # mean log-probabilities log ¾ and log ¼
    quarters = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    pairs = Pairs(2 * quarters[:1], 4 * quarters[1:], torch.tensor([2]), torch.tensor([4]))
    # β (log ¾ - log ¼) - γ = log 3 - γ
    assert paired_loss("simpo", beta=1.0, simpo_gamma=0.0)(pairs).item() == pytest.approx(-log(0.75))
    assert paired_loss("simpo", beta=1.0, simpo_gamma=L3)(pairs).item() == pytest.approx(log(2))
    assert paired_loss("simpo", beta=2.0, simpo_gamma=L3)(pairs).item() == pytest.approx(-log(0.75))
    # odds 3 and 1/3
    assert log_odds_ratio(pairs).item() == pytest.approx(log(9))
    assert paired_loss("odds_ratio", beta=0.5)(pairs).item() == pytest.approx(-0.5 * log(0.9))
    # CPO: log π(y_w) - log π(y_l) = 2 log ¾ - 4 log ¼ = log 144
    assert paired_loss("sigmoid", beta=1.0)(pairs).item() == pytest.approx(-log(144 / 145))


@pytest.mark.parametrize("name", [*PAIRED, "simpo", "odds_ratio"])
def test_gradients_favour_the_chosen(name):
    # a little apart: at u = v apo_down has no gradient at the chosen one
    pairs = one_pair(u=0.2, v=-0.3)
    if name not in PAIRED:
        pairs.ref_chosen = pairs.ref_rejected = None
    pairs.chosen.requires_grad_()
    pairs.rejected.requires_grad_()
    paired_loss(name, beta=0.5, label_smoothing=EPSILON.get(name, 0.0))(pairs).sum().backward()
    chosen, rejected = (0.0 if p.grad is None else p.grad.item() for p in (pairs.chosen, pairs.rejected))
    assert chosen < rejected
    assert rejected == 0 if name == "sft" else rejected > 0
    # the chosen one of apo_down is worse than the policy's own: it falls, more slowly than the rejected one
    assert chosen < 0 if name != "apo_down" else chosen > -rejected


@pytest.mark.parametrize("name", [*SMOOTH, "simpo", "odds_ratio"])
def test_gradients_are_the_derivatives(name):
    pairs = many_pairs(3)
    loss = paired_loss(name, beta=0.3, label_smoothing=EPSILON.get(name, 0.0))
    assert torch.autograd.gradcheck(
        lambda w, v: loss(
            Pairs(w, v, pairs.chosen_tokens, pairs.rejected_tokens, pairs.ref_chosen, pairs.ref_rejected)
        ),
        (pairs.chosen, pairs.rejected),
    )


EXTREMES = [0.0, -1e-9, -0.5, -1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "objective",
    [
        *(pair_objective(name, beta=0.5, label_smoothing=EPSILON.get(name, 0.0)) for name in PAIRED),
        *(pair_objective(n, beta=0.5, f_divergence=d) for n in ("sigmoid", "ipo", "discopop") for d in DIVERGENCES),
        pair_objective("sigmoid", f_divergence="alpha_divergence", f_alpha=2.0),
        *(cpo_objective(name, alpha=alpha) for name in ("sigmoid", "ipo", "alphapo") for alpha in (0.0, 0.5, -0.5)),
        orpo_objective(),
    ],
)
def test_extreme_log_probabilities_are_safe(objective, dtype):
    grid = torch.cartesian_prod(*[torch.tensor(EXTREMES, dtype=dtype)] * 4)
    chosen, rejected, ref_chosen, ref_rejected = grid.unbind(1)
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    counts = torch.ones(len(grid), dtype=torch.long)
    references = (ref_chosen, ref_rejected) if objective.prepare is None else (None, None)
    losses = objective(Pairs(chosen, rejected, counts, counts, *references))
    losses.total(pairs=len(grid), tokens=len(grid)).backward()
    assert losses.per_pair.dtype == dtype
    for value in (losses.per_pair, losses.per_token, chosen.grad, rejected.grad):
        assert value is None or value.isfinite().all()


def test_pairs_without_tokens_are_safe():
    zeros = torch.zeros(1)
    for name in PAIRED | REFERENCE_FREE:
        loss = paired_loss(name, beta=0.5, label_smoothing=EPSILON.get(name, 0.0))
        assert loss(Pairs(zeros, zeros, zeros.long(), zeros.long())).isfinite().all()
        assert loss(many_pairs().select(torch.zeros(6, dtype=torch.bool))).shape == (0,)


# u = ln 3: 1 - 1/3; log 2 + log ¾; (√3⁻¹ - 1) / -½; (3 - 1) / 1
@pytest.mark.parametrize(
    ("name", "alpha", "expected"),
    [
        ("reverse_kl", 0.5, L3),
        ("forward_kl", 0.5, 2 / 3),
        ("js_divergence", 0.5, log(1.5)),
        ("alpha_divergence", 0.5, 2 - 2 / math.sqrt(3)),
        ("alpha_divergence", 0.0, 2 / 3),
        ("alpha_divergence", 1.0, L3),
        ("alpha_divergence", 1 + 1e-9, L3),
        ("alpha_divergence", 2.0, 2.0),
    ],
)
def test_divergences_by_hand(name, alpha, expected):
    f = divergence(name, alpha=alpha)
    u = torch.tensor([L3, 0.0], dtype=torch.float64, requires_grad=True)
    value = f(u)
    assert value[0].item() == pytest.approx(expected, abs=1e-9) and value[1].item() == pytest.approx(0, abs=1e-12)
    value.sum().backward()
    assert (u.grad > 0).all()


def test_a_capped_exponent_still_pulls_back():
    u = torch.tensor([-CAP, -2 * CAP], requires_grad=True)
    value = divergence("forward_kl")(u)
    value.sum().backward()
    # e^c - 1 at the cap, its tangent beyond
    torch.testing.assert_close(value.detach(), -math.exp(CAP) * torch.tensor([1.0, 1 + CAP]))
    torch.testing.assert_close(u.grad, torch.full((2,), math.exp(CAP)))


def rows(*, seed=0, lengths=((2, 4), (3, 1))):
    draw = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths).reshape(-1)
    mask = torch.arange(5)[None] < counts[:, None]
    logp, reference = -torch.rand(2, len(counts), 5, generator=draw, dtype=torch.float64)
    return logp, reference, mask


def test_pairs_of_rows():
    logp, reference, mask = rows()
    pairs = pairs_of(logp.masked_fill(~mask, math.nan), mask, reference.masked_fill(~mask, math.inf))
    assert (pairs.chosen_tokens.tolist(), pairs.rejected_tokens.tolist()) == ([2, 3], [4, 1])
    torch.testing.assert_close(pairs.chosen, torch.stack([logp[0, :2].sum(), logp[2, :3].sum()]))
    torch.testing.assert_close(pairs.rejected, torch.stack([logp[1, :4].sum(), logp[3, :1].sum()]))
    torch.testing.assert_close(pairs.v[1], logp[3, 0] - reference[3, 0])
    assert pairs_of(logp.bfloat16(), mask).chosen.dtype == torch.float32


def test_masked_tokens_get_no_gradient():
    logp, reference, mask = rows()
    logp.requires_grad_()
    losses = pair_objective(["sigmoid", "sft"])(pairs_of(logp, mask, reference, ld_alpha=0.5))
    losses.total(pairs=2, tokens=5).backward()
    assert (logp.grad[~mask] == 0).all() and (logp.grad[mask] != 0).all()


def test_ld_weights_by_hand():
    # completions of 2 and 4 tokens, after one that is not counted; and of 3 and 1
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = [[0, 1, 1, 0, 0], [0, 1, 1, 0.25, 0.25], [1, 0.25, 0.25, 0, 0], [1, 0, 0, 0, 0]]
    assert ld_weights(mask, 0.25).tolist() == expected
    with pytest.raises(ValueError, match="between 0 and 1, 1.5"):
        ld_weights(mask, 1.5)


def test_ld_alpha_weighs_both_models_and_leaves_nll_alone():
    logp, reference, mask = rows()
    pairs = pairs_of(logp, mask, reference, ld_alpha=0.25)
    expected = logp[1, :2].sum() + 0.25 * logp[1, 2:4].sum() - reference[1, :2].sum() - 0.25 * reference[1, 2:4].sum()
    torch.testing.assert_close(pairs.v[0], expected)
    torch.testing.assert_close(pairs.nll, -pairs_of(logp, mask).chosen)
    plain = pairs_of(logp, mask, reference)
    torch.testing.assert_close(pairs_of(logp, mask, reference, ld_alpha=1.0).u, plain.u)


def test_wpo_weights_by_hand():
    # p = ½, ½ of a uniform choice of two: Σ p² = ½, so each token weighs 1; p = ¼ where Σ p² = ½ weighs ½
    logp = torch.tensor([[0.5, 0.5, 0.9], [0.25, 0.5, 0.25]]).log().requires_grad_()
    collision = torch.full((2, 3), 0.5).log()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    weights = wpo_weights(logp, collision, mask)
    torch.testing.assert_close(weights, torch.tensor([0.5]))
    assert not weights.requires_grad


def test_weights_multiply_pairs_and_not_tokens():
    pairs = many_pairs()
    pairs.weights = torch.arange(6.0)
    plain = pair_objective(["sigmoid", "sft"])(pairs)
    weighted = pair_objective(["sigmoid", "sft"], use_weighting=True)(pairs)
    torch.testing.assert_close(weighted.per_pair, pairs.weights * plain.per_pair)
    torch.testing.assert_close(weighted.per_token, plain.per_token)
    torch.testing.assert_close(weighted.terms["sigmoid"], plain.terms["sigmoid"])


def test_a_list_of_losses_is_their_weighted_sum():
    pairs = many_pairs()
    mpo = pair_objective(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.1)(pairs)
    sigmoid, bco, nll = (paired_loss(name, beta=0.1)(pairs) for name in ("sigmoid", "bco_pair", "sft"))
    torch.testing.assert_close(mpo.per_pair, 0.8 * sigmoid + 0.2 * bco)
    torch.testing.assert_close(mpo.per_token, nll)
    tokens = pairs.chosen_tokens.sum()
    expected = 0.8 * sigmoid.mean() + 0.2 * bco.mean() + nll.sum() / tokens
    torch.testing.assert_close(mpo.total(pairs=6, tokens=tokens), expected)
    torch.testing.assert_close(mpo.chosen_rewards, 0.1 * (pairs.chosen - pairs.ref_chosen).detach())
    assert list(mpo.terms) == ["sigmoid", "bco_pair", "sft"] and not mpo.terms["sft"].requires_grad


@pytest.mark.parametrize(
    "objective",
    [
        pair_objective(["sigmoid", "ipo", "sft"], [1.0, 0.5, 2.0]),
        pair_objective("sigmoid", f_divergence="js_divergence"),
        cpo_objective("simpo", cpo_alpha=0.5),
        orpo_objective(),
    ],
)
def test_a_step_may_be_cut_anywhere(objective):
    pairs = many_pairs(reference=objective.prepare is None)
    counts = {"pairs": 6, "tokens": pairs.chosen_tokens.sum()}
    whole = objective(pairs).total(**counts)
    keep = torch.arange(6) < 2
    parts = objective(pairs.select(keep)).total(**counts) + objective(pairs.select(~keep)).total(**counts)
    torch.testing.assert_close(parts, whole)
    for own in (pairs.chosen, pairs.rejected):
        torch.testing.assert_close(*(torch.autograd.grad(v, own, retain_graph=True)[0] for v in (parts, whole)))


def test_alphapo_by_hand():
    # p̄ = ¼ and 1/9, α = ½: rewards (1 - 2) / ½ = -2 and (1 - 3) / ½ = -4
    p = torch.tensor([1 / 4, 1 / 9], dtype=torch.float64).log()
    pairs = Pairs(3 * p[:1], 2 * p[1:], torch.tensor([3]), torch.tensor([2]))
    losses = cpo_objective("alphapo", beta=0.5, alpha=0.5, simpo_gamma=1.0)(pairs)
    assert losses.chosen_rewards.item() == pytest.approx(-1) and losses.rejected_rewards.item() == pytest.approx(-2)
    # β·2 - γ = 0
    assert losses.per_pair.item() == pytest.approx(log(2)) and losses.per_token.item() == 0


def test_cpo_and_orpo_terms():
    pairs = many_pairs(reference=False)
    cpo = cpo_objective("sigmoid", beta=0.1, cpo_alpha=0.5)(pairs)
    torch.testing.assert_close(cpo.per_pair, paired_loss("sigmoid", beta=0.1)(pairs))
    torch.testing.assert_close(cpo.per_token, -0.5 * pairs.chosen)
    torch.testing.assert_close(cpo.chosen_rewards, 0.1 * pairs.chosen.detach())
    assert list(cpo_objective("simpo", cpo_alpha=0.0)(pairs).terms) == ["simpo"]
    orpo = orpo_objective(beta=0.2)(pairs)
    torch.testing.assert_close(orpo.per_pair, paired_loss("odds_ratio", beta=0.2)(pairs))
    torch.testing.assert_close(orpo.per_token, -pairs.chosen)
    torch.testing.assert_close(orpo.rejected_rewards, 0.2 * (pairs.rejected / pairs.rejected_tokens).detach())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(pair_objective, "sigmod"), "'sigmod'.*Did you mean 'sigmoid'"),
        (partial(pair_objective, "simpo"), "Unknown preference loss 'simpo': choose one of sigmoid, hinge"),
        (partial(pair_objective, []), "No preference loss"),
        (partial(pair_objective, ["sft", "sft"]), "twice"),
        (partial(pair_objective, ["sigmoid", "sft"], [1.0]), "1 weights were given for 2 losses"),
        (partial(pair_objective, "sigmoid", [math.inf]), "finite"),
        (partial(pair_objective, "sigmoid", beta=0.0), "beta must be a positive number, 0.0"),
        (partial(pair_objective, "discopop", discopop_tau=-1.0), "discopop_tau"),
        (partial(pair_objective, "exo_pair"), "label_smoothing > 0"),
        (partial(pair_objective, "robust", label_smoothing=0.5), "label_smoothing < 0.5, 0.5"),
        (partial(pair_objective, "sigmoid", label_smoothing=-0.1), "0 <= label_smoothing"),
        (partial(pair_objective, ["ipo", "sft"], label_smoothing=0.1), "no effect on ipo, sft.*sigmoid, exo_pair"),
        (partial(pair_objective, "sigmoid", f_divergence="kl"), "Unknown divergence 'kl'"),
        (partial(pair_objective, ["sigmoid", "nca_pair"], f_divergence="forward_kl"), "not defined for nca_pair"),
        (partial(pair_objective, "sigmoid", f_divergence="alpha_divergence", f_alpha=math.nan), "finite"),
        (partial(pair_objective, "aot", use_weighting=True), "does not fit aot"),
        (partial(cpo_objective, "simp"), "Unknown CPO loss 'simp'.*Did you mean 'simpo'"),
        (partial(cpo_objective, "ipo", label_smoothing=0.1), "no effect on ipo"),
        (partial(cpo_objective, "simpo", simpo_gamma=math.nan), "simpo_gamma"),
        (partial(orpo_objective, beta=-1.0), "beta"),
    ],
)
def test_options_that_cannot_work_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_options_of_one_loss_of_a_list_are_allowed():
    assert pair_objective(["robust", "hinge"], label_smoothing=0.1).losses["robust"].keywords["label_smoothing"] == 0.1
