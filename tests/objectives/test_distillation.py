"""The generalised Jensen-Shannon divergence against hand-computed numbers, whole and in chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

from shared.objectives.distillation import Head, common_tokens, head_jsd, head_jsd_sum, jsd, kl_divergence
from shared.objectives.head_chunks import HeadTransform

LN2 = math.log(2)
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # teacher p = (¾, ¼), student q = (½, ½)
        (0.0, 0.75 * math.log(1.5) - 0.25 * LN2),  # Σ p ln p/q
        (1.0, 0.5 * math.log(2 / 3) + 0.5 * LN2),  # Σ q ln q/p
        # m = (⅝, ⅜): ½ (¾ ln 6/5 + ¼ ln 2/3) + ½ (½ ln 4/5 + ½ ln 4/3)
        (0.5, 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))),
        # m = ¼ p + ¾ q = (9/16, 7/16): ¼ (¾ ln 4/3 + ¼ ln 4/7) + ¾ (½ ln 8/9 + ½ ln 8/7)
        (0.25, 0.25 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7)) + 0.375 * math.log(64 / 63)),
    ],
)
def test_divergences_by_hand(beta, expected):
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()
    torch.testing.assert_close(jsd(student, teacher, beta=beta), torch.tensor([expected]))


def test_temperature_divides_both():
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = torch.tensor([0.75 * math.log(1.5) - 0.25 * LN2])  # at τ = 2 the teacher is (¾, ¼)
    torch.testing.assert_close(jsd(student, teacher, beta=0.0, temperature=2.0), expected)


@pytest.mark.parametrize("beta", BETAS)
def test_the_student_goes_to_the_teacher_which_stays(beta):
    student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    loss = jsd(student, teacher, beta=beta)
    assert loss.item() > 0
    loss.sum().backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1] and teacher.grad is None
    same = student.detach().requires_grad_()
    equal = jsd(same, same.detach(), beta=beta)
    equal.sum().backward()
    torch.testing.assert_close(equal.detach(), torch.zeros(1))
    torch.testing.assert_close(same.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_exchanging_teacher_and_student_is_exchanging_their_shares(beta):
    one, other = randn(2, 4, 7)
    torch.testing.assert_close(jsd(one, other, beta=beta), jsd(other, one, beta=1 - beta))


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_are_ruled_out_add_nothing(beta):
    student, teacher = randn(2, 3, 5)
    wide = [torch.cat([x, torch.full((3, 2), -math.inf, dtype=x.dtype)], 1) for x in (student, teacher)]
    wide[0].requires_grad_()
    losses = jsd(*wide, beta=beta)
    torch.testing.assert_close(losses.detach(), jsd(student, teacher, beta=beta))
    losses.sum().backward()
    assert wide[0].grad.isfinite().all() and not wide[0].grad[:, 5:].any()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, None])
@pytest.mark.parametrize("beta", BETAS)
def test_chunks_do_not_change_values_or_gradients(beta, chunk_size):
    student, teacher = randn(2, 5, 6)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    student.requires_grad_()
    p, q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    whole = beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
    if beta in (0, 1):
        whole = F.kl_div(*((q, p) if beta == 0 else (p, q)), reduction="none", log_target=True).sum(-1)
    (expected,) = torch.autograd.grad((weights * whole).sum(), student)
    losses = jsd(student, teacher, beta=beta, temperature=2.0, chunk_size=chunk_size)
    torch.testing.assert_close(losses, whole)
    torch.testing.assert_close(torch.autograd.grad((weights * losses).sum(), student)[0], expected)
    assert not expected[1].any()  # a row that does not count has no gradient


@pytest.mark.parametrize("transform", [None, HeadTransform(scale=0.5, softcap=3.0, temperature=0.7)])
@pytest.mark.parametrize("chunk_size", [2, None])
def test_heads_give_what_their_logits_give(transform, chunk_size):
    hidden, weight, bias = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(5, 3), (6, 3), (6,)]))
    teacher = Head(randn(5, 4, seed=3), randn(6, 4, seed=4))  # of another hidden size
    logits = hidden @ weight.T + bias
    if transform is not None:
        logits = 3 * torch.tanh(0.5 * logits / 3) / 0.7
    expected = jsd(logits, teacher.hidden_NH @ teacher.weight_VH.T, beta=0.3, temperature=1.5)
    student = Head(hidden, weight, bias, transform)
    found = head_jsd(student, teacher, beta=0.3, temperature=1.5, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected)
    inputs = (hidden, weight, bias)
    both = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, expected))
    for own, other in zip(*both, strict=True):
        torch.testing.assert_close(own, other)
    with torch.no_grad():
        torch.testing.assert_close(head_jsd(student, teacher, beta=0.3, temperature=1.5, chunk_size=2), expected)


def test_the_memory_between_passes_does_not_grow_with_the_rows():
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    hidden, weight = randn(64, 4).requires_grad_(), randn(512, 4, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_jsd(Head(hidden, weight), Head(randn(64, 4, seed=2), weight), chunk_size=8)
    assert sum(saved) < 64 * 512


@pytest.mark.parametrize("transform", [None, HeadTransform(scale=0.5, softcap=3.0, temperature=0.7)])
@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("beta", BETAS)
def test_the_sum_has_the_gradient_of_its_tokens(beta, chunk_size, transform):
    hidden, weight, bias = (randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(5, 3), (6, 3), (6,)]))
    student, teacher = Head(hidden, weight, bias, transform), Head(randn(5, 4, seed=3), randn(6, 4, seed=4))
    options = {"beta": beta, "temperature": 1.5}
    expected = head_jsd(student, teacher, **options)
    total, stats = head_jsd_sum(student, teacher, **options, entropy=True, chunk_size=chunk_size)
    torch.testing.assert_close(stats.divergence, expected)
    torch.testing.assert_close(total, expected.sum())
    inputs = (hidden, weight, bias)
    both = (torch.autograd.grad(3 * x, inputs) for x in (total, expected.sum()))
    for own, other in zip(*both, strict=True):
        torch.testing.assert_close(own, other)
    logits = hidden @ weight.T + bias
    if transform is not None:
        logits = 3 * torch.tanh(0.5 * logits / 3) / 0.7
    logp = (logits / 1.5).log_softmax(-1)
    torch.testing.assert_close(stats.entropy, -(logp.exp() * logp).sum(-1).detach())
    best = (teacher.hidden_NH @ teacher.weight_VH.T).argmax(-1)
    assert stats.agrees.tolist() == (logp.argmax(-1) == best).tolist()
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


@pytest.mark.parametrize("beta", BETAS)
def test_the_sum_takes_logits_and_tokens_that_are_ruled_out(beta):
    student, teacher = randn(2, 3, 5)
    wide = [torch.cat([x, torch.full((3, 2), -math.inf, dtype=x.dtype)], 1) for x in (student, teacher)]
    student.requires_grad_()
    wide[0].requires_grad_()
    expected = jsd(student, teacher, beta=beta).sum()
    total, stats = head_jsd_sum(*wide, beta=beta, entropy=True)
    torch.testing.assert_close(total, expected)
    assert stats.entropy.isfinite().all()
    expected.backward()
    total.backward()
    torch.testing.assert_close(wide[0].grad[:, :5], student.grad)
    assert not wide[0].grad[:, 5:].any()


def test_a_padded_head_is_cut_to_the_tokens_of_both():
    hidden, weight, bias = randn(4, 3).requires_grad_(), randn(8, 3, seed=1).requires_grad_(), randn(8, seed=2)
    teacher = Head(randn(4, 2, seed=3), randn(6, 2, seed=4))
    cut = common_tokens(Head(hidden, weight, bias), teacher)
    assert cut[0].weight_VH.shape == (6, 3) and cut[0].bias.shape == (6,) and cut[1] is teacher
    total, _ = head_jsd_sum(*cut)
    total.backward()
    assert weight.grad[:6].abs().sum(1).all() and not weight.grad[6:].any()
    own, other = common_tokens(teacher.hidden_NH @ teacher.weight_VH.T, Head(hidden, weight))
    assert own.shape == (4, 6) and other.weight_VH.shape == (6, 3)


def test_the_sum_under_autocast_is_near_that_in_full():
    hidden, weight = randn(64, 8).float().requires_grad_(), randn(32, 8, seed=1).float().requires_grad_()
    teacher = Head(randn(64, 4, seed=2).bfloat16(), randn(32, 4, seed=3).bfloat16())
    full, _ = head_jsd_sum(Head(hidden, weight), teacher._replace(hidden_NH=teacher.hidden_NH.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, stats = head_jsd_sum(Head(hidden, weight), teacher)
    assert stats.divergence.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)
    for own, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (half, full)), strict=True):
        torch.testing.assert_close(own, other, rtol=0.05, atol=0.05)


def test_the_sum_over_no_token_is_zero_and_has_a_gradient():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    total, stats = head_jsd_sum(Head(hidden, weight), Head(torch.zeros(0, 2), torch.ones(6, 2)))
    total.backward()
    assert total.item() == 0 and not weight.grad.any() and stats.entropy is None and stats.agrees.shape == (0,)


def test_half_precision_is_computed_in_float32():
    student, teacher = (x.to(torch.bfloat16) for x in randn(2, 3, 5))
    found = jsd(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, jsd(student.float(), teacher.float()))


def test_no_token_has_no_loss_and_a_gradient_of_zero():
    student = torch.zeros(0, 4, requires_grad=True)
    loss = jsd(student, torch.zeros(0, 4)).sum()
    loss.backward()
    assert loss.item() == 0 and student.grad.shape == (0, 4)


def test_wrong_arguments_are_refused():
    for options, message in (({"beta": 1.1}, "in .0, 1."), ({"temperature": 0.0}, "positive")):
        with pytest.raises(ValueError, match=message):
            jsd(torch.zeros(1, 2), torch.zeros(1, 2), **options)
    with pytest.raises(ValueError, match="one vocabulary: 2 and 3"):
        jsd(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="same tokens: 1 and 2"):
        jsd(torch.zeros(1, 2), torch.zeros(2, 2))
