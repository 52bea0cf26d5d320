"""The generalised Jensen-Shannon divergence against hand-computed numbers, whole and in chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

from shared.objectives.distillation import Head, head_jsd, jsd, kl_divergence
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
