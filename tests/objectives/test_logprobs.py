"""The chunked head against hand-computed numbers and against plain logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shared.objectives.logprobs import HeadTransform, head_log_probs, head_objective
from shared.objectives.reduce import token_weights
from shared.objectives.supervised import dft, nll

TRANSFORMS = [
    HeadTransform(),
    HeadTransform(scale=0.25),
    HeadTransform(softcap=3.0),
    HeadTransform(scale=2.0, softcap=5.0, temperature=0.7),
    HeadTransform(temperature=1.7),
]


def make(n=11, v=17, h=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(v, (n,), generator=generator)


def plain_logp(hidden, weight, targets, bias=None, transform=None):
    transform = transform or HeadTransform()
    logits = F.linear(hidden, weight, bias)
    logits = (logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    every = (logits / transform.temperature).log_softmax(-1)
    return every.gather(1, targets[:, None]).squeeze(1), every


def mean_nll(hidden, weight, targets, **options):
    count = max(targets.numel(), 1)
    return head_objective(hidden, weight, targets, lambda logp, part: nll(logp) / count, **options)


def test_two_tokens_by_hand():
    # Head rows [1, 0], [0, 1], [0, 0]; hidden [ln 2, 0] and [0, 0]: softmax (1/2, 1/4, 1/4) and (1/3, 1/3, 1/3).
    hidden = torch.tensor([[math.log(2.0), 0.0], [0.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 2])

    stats = head_log_probs(hidden, weight, targets, entropy=True, collision=True)
    torch.testing.assert_close(stats.logp, torch.tensor([0.5, 1 / 3]).log())
    torch.testing.assert_close(stats.collision, torch.tensor([3 / 8, 1 / 3]).log())  # 1/4 + 1/16 + 1/16
    torch.testing.assert_close(stats.entropy, torch.tensor([1.5 * math.log(2), math.log(3)]))
    assert stats.correct.tolist() == [True, True]  # the second is a tie

    loss, _ = head_objective(hidden, weight, targets, lambda logp, part: -logp)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6))
    # d loss / d hidden = (softmax - onehot) @ weight; d loss / d weight = (softmax - onehot).T @ hidden
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.5, 0.25], [1 / 3, 1 / 3]]))
    torch.testing.assert_close(weight.grad, math.log(2.0) * torch.tensor([[-0.5, 0.0], [0.25, 0.0], [0.25, 0.0]]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_log_probs_gradcheck(transform, with_bias):
    hidden, weight, bias, targets = make(4, 6, 3, torch.float64)

    def logp(hidden, weight, bias):
        options = {"bias": bias if with_bias else None, "transform": transform, "chunk_size": 3}
        return head_log_probs(hidden, weight, targets, **options).logp

    assert torch.autograd.gradcheck(logp, (hidden, weight, bias) if with_bias else (hidden, weight, None))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11])
def test_objective_equals_plain_logits(transform, chunk_size):
    leaves = make(dtype=torch.float64)
    hidden, weight, bias, targets = leaves
    factor = torch.linspace(-1, 2, 11, dtype=torch.float64)

    def curve(logp, part):  # not linear in logp, and different for each token
        return factor[part] * (logp.exp() + logp.square())

    options = {"bias": bias, "transform": transform, "chunk_size": chunk_size, "entropy": True, "collision": True}
    loss, stats = head_objective(hidden, weight, targets, curve, **options)
    reference, every = plain_logp(hidden, weight, targets, bias, transform)
    reference_loss = curve(reference, slice(0, 11)).sum()
    torch.testing.assert_close(loss, reference_loss)
    torch.testing.assert_close(stats.logp, reference.detach())
    torch.testing.assert_close(stats.entropy, -(every.exp() * every).sum(-1).detach())
    torch.testing.assert_close(stats.collision, every.exp().square().sum(-1).log().detach())
    assert torch.equal(stats.correct, every.argmax(-1) == targets)
    ours = torch.autograd.grad(3 * loss, leaves[:3])  # a gradient other than 1 comes in
    torch.testing.assert_close(ours, torch.autograd.grad(3 * reference_loss, leaves[:3]))


@pytest.mark.parametrize("via", ["objective", "log_probs"])
def test_equals_cross_entropy_in_float32(via):
    hidden, weight, bias, targets = make(64, 300, 32)
    if via == "objective":
        loss, _ = mean_nll(hidden, weight, targets, bias=bias, chunk_size=20)
    else:
        loss = -head_log_probs(hidden, weight, targets, bias=bias, chunk_size=20).logp.mean()
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (hidden, weight, bias)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_collision_is_given_where_asked_for_and_leaves_the_gradients_alone(entropy):
    hidden, weight, bias, targets = make()
    plain = head_log_probs(hidden, weight, targets, bias=bias, entropy=entropy)
    asked = head_log_probs(hidden, weight, targets, bias=bias, entropy=entropy, collision=True, chunk_size=4)
    assert plain.collision is None and not asked.collision.requires_grad
    every = plain_logp(hidden, weight, targets, bias)[1]
    torch.testing.assert_close(asked.collision, every.exp().square().sum(-1).log().detach())
    gradients = [torch.autograd.grad(stats.logp.sum(), (hidden, weight, bias)) for stats in (asked, plain)]
    torch.testing.assert_close(*gradients)


def test_an_entropy_bonus_by_hand():
    # softmax (1/2, 1/4, 1/4): dH/dz = -p (log p + H) with H = 1.5 ln 2
    hidden = torch.tensor([[math.log(2.0), 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    loss, stats = head_objective(
        hidden, weight, torch.tensor([0]), lambda logp, part: 0 * logp, entropy_weights=torch.tensor([-2.0])
    )
    loss.backward()
    assert loss.item() == pytest.approx(-3 * math.log(2)) and stats.entropy.item() == pytest.approx(1.5 * math.log(2))
    torch.testing.assert_close(hidden.grad, -2 * math.log(2.0) * torch.tensor([[-0.25, 0.125]]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_entropy_gradcheck(transform, with_bias):
    hidden, weight, bias, targets = make(4, 6, 3, torch.float64)

    def figures(hidden, weight, bias):
        options = {"bias": bias if with_bias else None, "transform": transform, "chunk_size": 3}
        return head_log_probs(hidden, weight, targets, entropy_gradient=True, **options)[:2]

    assert torch.autograd.gradcheck(figures, (hidden, weight, bias) if with_bias else (hidden, weight, None))


@pytest.mark.parametrize("via", ["objective", "log_probs"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_an_entropy_bonus_equals_plain_logits(via, transform, chunk_size):
    leaves = make(dtype=torch.float64)
    hidden, weight, bias, targets = leaves
    of_entropy = torch.linspace(-2, 1, 11, dtype=torch.float64)
    options = {"bias": bias, "transform": transform, "chunk_size": chunk_size, "collision": True}
    if via == "objective":
        loss, stats = head_objective(
            hidden, weight, targets, lambda logp, part: logp.square(), entropy_weights=of_entropy, **options
        )
    else:
        stats = head_log_probs(hidden, weight, targets, entropy_gradient=True, **options)
        loss = stats.logp.square().sum() + (of_entropy * stats.entropy).sum()
    logp, every = plain_logp(hidden, weight, targets, bias, transform)
    entropy = -(every.exp() * every).sum(-1)
    reference = logp.square().sum() + (of_entropy * entropy).sum()
    torch.testing.assert_close((loss, stats.entropy), (reference, entropy))
    ours = torch.autograd.grad(3 * loss, leaves[:3])
    torch.testing.assert_close(ours, torch.autograd.grad(3 * reference, leaves[:3]))
    if via == "objective":
        with torch.no_grad():
            quiet, _ = head_objective(
                hidden, weight, targets, lambda logp, part: logp.square(), entropy_weights=of_entropy, **options
            )
        torch.testing.assert_close(quiet, loss.detach())


@pytest.mark.parametrize("via", ["objective", "log_probs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_an_entropy_bonus_in_half_precision(via, dtype):
    autocast = dtype == "autocast"
    leaves = make(60, 50, 16, torch.float32 if autocast else dtype)
    hidden, weight, bias, targets = leaves
    of_entropy = torch.linspace(-2, 1, 60) * 1e-6  # below what float16 resolves

    def nothing(logp, part):
        return 0 * logp

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if via == "objective":
            loss, _ = head_objective(
                hidden, weight, targets, nothing, bias=bias, chunk_size=32, entropy_weights=of_entropy
            )
        else:
            stats = head_log_probs(hidden, weight, targets, bias=bias, chunk_size=32, entropy_gradient=True)
            loss = (of_entropy * stats.entropy).sum()
    ours = torch.autograd.grad(loss * 2.0**14, leaves[:3])
    exact = [t.detach().double().requires_grad_() for t in leaves[:3]]
    every = plain_logp(*exact[:2], targets, exact[2])[1]
    reference = -(of_entropy * (every.exp() * every).sum(-1)).sum() * 2.0**14
    for got, want in zip(ours, torch.autograd.grad(reference, exact), strict=True):
        assert (got.double() - want).norm() <= (3e-3 if dtype == torch.float16 else 2e-2) * want.norm()


def test_an_entropy_that_was_not_asked_for_as_such_has_no_gradient():
    hidden, weight, _, targets = make()
    assert not head_log_probs(hidden, weight, targets, entropy=True).entropy.requires_grad
    stats = head_log_probs(hidden, weight, targets, entropy_gradient=True)
    alone = head_log_probs(hidden, weight, targets).logp
    gradients = [torch.autograd.grad(logp.sum(), (hidden, weight)) for logp in (stats.logp, alone)]
    torch.testing.assert_close(*gradients)


def test_large_logits_stay_finite():
    hidden, weight = torch.tensor([[300.0], [-300.0]]), torch.tensor([[1.0], [0.0]])
    stats = head_log_probs(hidden, weight, torch.tensor([1, 1]), entropy=True, collision=True)
    torch.testing.assert_close(stats.logp, torch.tensor([-300.0, 0.0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(stats.collision, torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("via", ["objective", "log_probs"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_bfloat16_is_as_accurate_as_plain_logits(via, autocast, chunk_size):
    hidden, weight, bias, targets = make(400, 500, 64, torch.float32 if autocast else torch.bfloat16)
    hidden = (hidden / 4).detach().requires_grad_()
    leaves = (hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if via == "objective":
            loss, _ = mean_nll(hidden, weight, targets, bias=bias, chunk_size=chunk_size)
        else:
            loss = -head_log_probs(hidden, weight, targets, bias=bias, chunk_size=chunk_size).logp.mean()
        plain = -plain_logp(hidden, weight, targets, bias)[0].mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)  # the very same rounded logits

    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = -plain_logp(*exact_leaves[:2], targets, exact_leaves[2])[0].mean()
    gradients = zip(
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(plain, leaves),
        torch.autograd.grad(exact, exact_leaves),
        leaves,
        strict=True,
    )
    for ours, theirs, truth, leaf in gradients:
        assert ours.dtype == leaf.dtype
        bound = 1.05 if chunk_size is None else 1.2  # each chunk's product is rounded before it is added
        assert (ours.double() - truth).norm() <= bound * (theirs.double() - truth).norm() + 1e-9


def test_float16_gradients_survive_a_tiny_weight():
    # A token's weight of 1e-6 is below what float16 resolves; the loss scale that would save it comes in afterwards.
    hidden, weight, bias, targets = make(40, 30, 8, torch.float16)

    def tiny(logp, part):
        return -1e-6 * logp

    loss, _ = head_objective(hidden, weight, targets, tiny, bias=bias, chunk_size=16)
    ours = torch.autograd.grad(loss * 2.0**14, (hidden, weight, bias))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    reference = -1e-6 * 2.0**14 * plain_logp(*exact[:2], targets, exact[2])[0].sum()
    for got, want in zip(ours, torch.autograd.grad(reference, exact), strict=True):
        assert got.dtype == torch.float16
        assert (got.double() - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("via", ["objective", "log_probs"])
def test_no_counted_token_gives_zero_gradients(via):
    hidden, weight, bias, _ = make(0, 7, 3)
    targets = torch.zeros(0, dtype=torch.long)
    if via == "objective":
        loss, stats = mean_nll(hidden, weight, targets, bias=bias, entropy=True)
    else:
        stats = head_log_probs(hidden, weight, targets, bias=bias, entropy=True)
        loss = stats.logp.sum()
    assert loss.item() == 0 and stats.logp.shape == stats.entropy.shape == stats.correct.shape == (0,)
    loss.backward()
    assert hidden.grad.shape == (0, 3)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("via", ["objective", "log_probs"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(via, frozen):
    leaves = dict(zip(("hidden", "weight", "bias"), make()[:3], strict=True))
    targets = make()[3]
    leaves[frozen].requires_grad_(False)
    if via == "objective":
        loss, _ = mean_nll(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"])
    else:
        loss = -head_log_probs(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"]).logp.mean()
    loss.backward()
    got = {name: leaf.grad is not None for name, leaf in leaves.items()}
    assert got == {name: name != frozen for name in leaves}
    plain = [leaves[name].detach().requires_grad_() for name in leaves]
    F.cross_entropy(F.linear(*plain), targets).backward()
    for leaf, reference in zip(leaves.values(), plain, strict=True):
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, reference.grad)


def test_without_gradient_the_loss_is_the_same():
    hidden, weight, bias, targets = make()
    loss, stats = mean_nll(hidden, weight, targets, bias=bias, chunk_size=4)
    with torch.no_grad():
        quiet, quiet_stats = mean_nll(hidden, weight, targets, bias=bias, chunk_size=4)
    assert not quiet.requires_grad and loss.requires_grad and not stats.logp.requires_grad
    assert torch.equal(quiet, loss.detach()) and torch.equal(quiet_stats.logp, stats.logp)


def test_an_objective_that_ignores_the_log_probabilities():
    hidden, weight, _, targets = make()
    loss, _ = head_objective(hidden, weight, targets, lambda logp, part: torch.ones_like(logp))
    loss.backward()
    assert loss.item() == 11 and not hidden.grad.any() and not weight.grad.any()


def test_objective_backward_runs_once():
    hidden, weight, _, targets = make()
    loss, _ = mean_nll(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_dft_gradient_is_nll_gradient_times_probability():
    hidden, weight, _, targets = make()
    loss, stats = head_objective(hidden, weight, targets, lambda logp, part: dft(logp), chunk_size=4)
    (ours,) = torch.autograd.grad(loss, hidden)
    plain, _ = head_objective(hidden, weight, targets, lambda logp, part: nll(logp))
    (reference,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(ours, stats.logp.exp()[:, None] * reference)


@pytest.mark.parametrize("mode", ["token", "sequence", "fixed"])
def test_batch_1_accumulated_8_times_equals_batch_8(mode):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(8, 6, 5, generator=generator)
    targets = torch.randint(13, (8, 6), generator=generator)
    mask = torch.rand(8, 6, generator=generator) < 0.5
    mask[2] = False  # a micro-batch without a counted token
    denominator = {"token": mask.sum(), "sequence": mask.any(1).sum(), "fixed": 8 * 6}[mode]

    def step(rows_of_each):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 65).reshape(13, 5))
        total = 0.0
        for rows in torch.arange(8).split(rows_of_each):
            chosen = mask[rows]
            weights = token_weights(chosen, mode=mode, denominator=denominator)[chosen]
            loss, _ = head_objective(
                hidden[rows][chosen],
                weight,
                targets[rows][chosen],
                lambda logp, part, weights=weights: weights[part] * nll(logp),
                chunk_size=3,
            )
            loss.backward()
            total += loss.item()
        return total, weight.grad

    one, gradient_of_one = step(8)
    eight, gradient_of_eight = step(1)
    assert eight == pytest.approx(one, abs=1e-6)
    torch.testing.assert_close(gradient_of_eight, gradient_of_one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    hidden, weight, bias, targets = make()

    def run(hidden):
        return mean_nll(hidden.tanh(), weight, targets, bias=bias)[0]

    expected = torch.autograd.grad(run(hidden), (hidden, weight, bias))
    checkpoint(run, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad, bias.grad), expected)


def test_backward_inside_autocast_keeps_float32():
    hidden, weight, _, targets = make()
    loss = -head_log_probs(hidden, weight, targets).logp.mean()
    expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_half_precision_weight_gradient_adds_up_in_float32():
    # 512 chunks of one token each give the gradient 1 - 1/2: a bfloat16 sum would stop growing at 128.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    head_objective(hidden, weight, targets, lambda logp, part: -logp, chunk_size=1)[0].backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("via", ["objective", "log_probs"])
def test_logits_of_all_tokens_never_exist(via):
    hidden, weight, bias, targets = make(60, 1000, 4)
    with LargestTensor() as largest:
        if via == "objective":
            bonus = torch.ones(60)
            loss, _ = mean_nll(hidden, weight, targets, bias=bias, chunk_size=10, entropy_weights=bonus)
        else:
            stats = head_log_probs(hidden, weight, targets, bias=bias, chunk_size=10, entropy_gradient=True)
            loss = (stats.entropy - stats.logp).mean()
        torch.autograd.grad(loss, (hidden, weight, bias))
    assert largest.numel == 10 * 1000
