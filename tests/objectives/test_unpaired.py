import math

import pytest
import torch
import torch.nn.functional as F

from shared.objectives.unpaired import (
    apo_zero_unpaired,
    bco,
    density_ratio,
    desirable_probability,
    fit_logistic,
    kl_estimate,
    kl_sums,
    kto,
    running_mean,
)

L3 = math.log(3)
DESIRABLE = torch.tensor([True, False])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_kto_by_hand():
    # z = ln 3: u - z = ln 3 and 0; 1 - σ(ln 3) = 1/4, 1 - σ(0) = 1/2
    loss = kto(double(2 * L3, L3), DESIRABLE, L3, beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    torch.testing.assert_close(loss, double(0.5, 1.5))
    # β = ½, z = 0: σ(½ · 2 ln 3) = 3/4, so 1/4 for the desirable row; σ(-ln 3) = 1/4, so 3/4 for the other
    torch.testing.assert_close(kto(double(2 * L3, 2 * L3), DESIRABLE, double(0.0), beta=0.5), double(0.25, 0.75))


def test_apo_zero_is_kto_without_a_reference_point():
    u = double(L3, L3)
    torch.testing.assert_close(apo_zero_unpaired(u, DESIRABLE, beta=1.0), double(0.25, 0.75))
    weights = {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.9}
    torch.testing.assert_close(apo_zero_unpaired(u, DESIRABLE, **weights), kto(u, DESIRABLE, 0.0, **weights))


def test_bco_by_hand():
    # βu - δ = ln 3 and 0
    loss = bco(double(2 * L3, L3), DESIRABLE, L3, beta=1.0)
    torch.testing.assert_close(loss, double(-math.log(0.75), math.log(2)))
    # the density ratio weighs undesirable rows alone
    weighted = bco(double(2 * L3, L3), DESIRABLE, L3, beta=1.0, density_ratio_P=torch.tensor([9.0, 3.0]))
    torch.testing.assert_close(weighted, double(-math.log(0.75), 3 * math.log(2)))


LOSSES = {
    "kto": lambda u, shift: kto(u, DESIRABLE, shift),
    "apo_zero_unpaired": lambda u, shift: apo_zero_unpaired(u, DESIRABLE),
    "bco": lambda u, shift: bco(u, DESIRABLE, shift),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    u, shift = double(0.7, -0.4).requires_grad_(), double(0.2)[0].requires_grad_()
    LOSSES[name](u, shift).sum().backward()
    desirable, undesirable = u.grad.tolist()
    assert desirable < 0 < undesirable
    # z and δ are estimates, nothing to be learnt
    assert shift.grad is None
    assert torch.autograd.gradcheck(lambda u: LOSSES[name](u, 0.2), u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_are_safe(dtype):
    u = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    for desirable in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        for loss in (kto(u, desirable, 1e4), apo_zero_unpaired(u, desirable), bco(u, desirable, -1e4)):
            assert loss.dtype == dtype and loss.isfinite().all()
            assert torch.autograd.grad(loss.sum(), u)[0].isfinite().all()


def test_kl_estimate_adds_over_ranks():
    policy, reference = torch.tensor([-1.0, -2.0, -7.0]).requires_grad_(), torch.tensor([-3.0, -1.0, -2.0])
    # log-ratios 2, -1, -5
    sums = kl_sums(policy, reference)
    assert sums.tolist() == [-4.0, 3.0] and not sums.requires_grad
    assert kl_estimate(sums).item() == 0
    two = kl_sums(policy, reference, torch.tensor([True, True, False]))
    assert two.tolist() == [1.0, 2.0] and kl_estimate(two).item() == 0.5
    first, second = kl_sums(policy[:1], reference[:1]), kl_sums(policy[1:2], reference[1:2])
    assert kl_estimate(first + second).item() == 0.5
    assert kl_estimate(kl_sums(policy, reference, torch.zeros(3))).item() == 0


def test_running_mean_is_the_mean_of_all():
    values = torch.arange(10.0) ** 2
    mean, count = torch.zeros(()), torch.zeros(())
    for part in values.split([3, 0, 1, 6]):
        mean, count = running_mean(mean, count, part.sum(), torch.tensor(float(len(part))))
    torch.testing.assert_close(mean, values.mean())
    assert count == 10
    assert running_mean(torch.zeros(()), torch.zeros(()), torch.zeros(()), torch.zeros(()))[0] == 0


def test_density_ratio_by_hand():
    ratio = density_ratio(double(0.75, 0.1, 1.0, 0.0), minimum=0.5, maximum=10.0)
    torch.testing.assert_close(ratio, double(3.0, 0.5, 10.0, 0.5))
    with pytest.raises(ValueError, match="2.0 and 1.0"):
        density_ratio(double(0.5), minimum=2.0, maximum=1.0)


def test_logistic_by_hand():
    # a feature of ±1 with no penalty: 3 of 4 rows at +1 are desirable, 1 of 4 at -1, so p = σ(±ln 3)
    features = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])[:, None]
    labels = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool()
    weight, bias = fit_logistic(features, labels, l2=0.0)
    assert weight.dtype == torch.float64 and weight.shape == (1,) and bias.shape == ()
    assert weight.item() == pytest.approx(L3, abs=1e-6) and bias.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        desirable_probability(torch.tensor([[1.0], [-1.0]]), weight, bias), double(0.75, 0.25), rtol=1e-6, atol=1e-6
    )


def test_logistic_minimises_what_it_says():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=draw, dtype=torch.float64)
    labels = features[:, 0] + torch.randn(40, generator=draw) > 1  # the classes differ in size
    with torch.no_grad():  # as trainers call it
        weight, bias = fit_logistic(features, labels, l2=0.5)
    again = fit_logistic(features, labels, l2=0.5)
    assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])
    weight.requires_grad_(), bias.requires_grad_()
    counts = torch.where(labels, labels.sum(), (~labels).sum())
    nll = F.binary_cross_entropy_with_logits(features @ weight + bias, labels.double(), reduction="none")
    (0.25 * weight.square().sum() + (len(labels) / (2 * counts) * nll).sum()).backward()
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs() < 1e-6


def test_separable_classes_stay_finite():
    features = torch.tensor([[0.0, 100.0], [0.0, 200.0], [100.0, 0.0]])
    weight, bias = fit_logistic(features, torch.tensor([True, True, False]))
    assert weight.isfinite().all() and bias.isfinite()
    assert (desirable_probability(features, weight, bias) > 0.5).tolist() == [True, True, False]


def test_logistic_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="needs both: 3 of 3"):
        fit_logistic(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        fit_logistic(torch.tensor([[1.0], [math.nan]]), DESIRABLE)
    with pytest.raises(ValueError, match="negative"):
        fit_logistic(torch.ones(2, 1), DESIRABLE, l2=-1.0)
