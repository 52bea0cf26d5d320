"""Divergences between a student's and a teacher's distribution of the next token, one value a token.

With p the teacher, q the student, both softmax(logits / τ), and m = β p + (1-β) q:

    JSD(β) = β KL(p ‖ m) + (1-β) KL(q ‖ m)        0 < β < 1
    JSD(0) = KL(p ‖ q), the forward divergence    JSD(1) = KL(q ‖ p), the reverse one

as GKD has it (Agarwal et al. 2023, arXiv:2306.13649): the ends are conventions, near them the formula tends to 0. No
gradient flows to the teacher. Distillation on whole sequences that the teacher wrote (Kim and Rush 2016,
arXiv:1606.07947) is their plain negative log-likelihood and needs nothing from here.

Rows are taken some at a time, so that the memory does not grow with the number of rows. Two ways:

- `head_jsd_sum`, for the sum over all tokens: the gradients are computed in the forward pass, from both heads at once.
- `jsd` and `head_jsd`, for anything else: what is between logits, or hidden states, and divergence is computed again
  in the backward pass.

Dimension letters: N counted tokens, V vocabulary, H hidden size, n rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from shared.objectives.head_chunks import HeadTransform, Plan, default_chunk_size, no_autocast

ALL = slice(None)
LEAST_LOG_PROB = -1e4  # stands for a probability of 0, whose logarithm has no difference to another's


class Head(NamedTuple):
    """A language-model head at some tokens.

    Args:
        hidden_NH: `(N, H)` hidden states of the counted tokens.
        weight_VH: `(V, H)`.
        bias: `(V,)`.
        transform: what the model does to its logits; None: nothing.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias: Tensor | None = None
    transform: HeadTransform | None = None


class DistillationStats(NamedTuple):
    """Figures of N tokens, without gradient.

    Args:
        divergence: `(N,)`.
        agrees: `(N,)` bool, whether the student's most likely token is the teacher's.
        entropy: `(N,)` of the student's distribution, in nats; None where not asked for.
    """

    divergence: Tensor
    agrees: Tensor
    entropy: Tensor | None


def kl_divergence(logp: Tensor, other: Tensor) -> Tensor:
    """`Σ_v p(v) (log p(v) - log q(v))`: how far q is from p. Differentiable in both.

    A token that p rules out adds nothing.

    Args:
        logp, other: `(…, V)` log-probabilities of p and q, -inf for what is ruled out.

    Returns:
        `(…)`.
    """
    return (logp.exp() * (logp.clamp_min(LEAST_LOG_PROB) - other.clamp_min(LEAST_LOG_PROB))).sum(-1)


def jsd(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row.

    Extra memory: some `(n, V)` in float32.

    Args:
        student_NV, teacher_NV: `(N, V)` logits of the counted tokens.
        beta: β, in [0, 1].
        temperature: τ, of both. The divergence is not multiplied by τ².
        chunk_size: n; None: chosen by V.

    Returns:
        `(N,)`, in float32 at least.

    Raises:
        ValueError: β or τ out of range, or vocabularies of different sizes.
    """
    _check(beta, temperature, student_NV.shape[-1], teacher_NV.shape[-1])
    size = chunk_size or default_chunk_size(student_NV.shape[-1], 0)

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergence(_log_softmax(student, temperature), _log_softmax(teacher, temperature), beta)

    return _by_chunks(rows, student_NV, teacher_NV.detach(), size)


def head_jsd(
    student: Head,
    teacher: Head,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`jsd` straight from hidden states: the logits of all tokens never exist at once.

    Differentiable in the student's hidden states, weight and bias. The hidden sizes may differ.

    Args:
        student, teacher: the heads, at the same N tokens.
        beta, temperature, chunk_size: see `jsd`; τ divides what the heads' transforms give.

    Returns:
        `(N,)`, in float32 at least.

    Raises:
        ValueError: see `jsd`.
    """
    _check(beta, temperature, student.weight_VH.shape[0], teacher.weight_VH.shape[0])
    size = chunk_size or default_chunk_size(*student.weight_VH.shape)
    fixed = Head(*(part.detach() if isinstance(part, Tensor) else part for part in teacher))

    def rows(own: Tensor, other: Tensor) -> Tensor:
        logp = _log_softmax(_Side.of(student._replace(hidden_NH=own)).logits()[0], temperature)
        with torch.no_grad():
            target = _log_softmax(_Side.of(fixed._replace(hidden_NH=other)).logits()[0], temperature)
        return _divergence(logp, target, beta)

    return _by_chunks(rows, student.hidden_NH, fixed.hidden_NH, size)


def head_jsd_sum(
    student: Head | Tensor,
    teacher: Head | Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, DistillationStats]:
    """Sum of `jsd` over all tokens, straight from hidden states, with its gradients computed in the forward pass.

    With f = (1-β) log(q / m) the gradient in the student's logits is q (f - Σ_v q f) / τ; for β = 0 it is (q - p) / τ.
    The backward pass multiplies what is stored by the gradient that comes in: it can run once. Products run in the
    type that autocast asks for, or in that of each head.

    Args:
        student, teacher: heads, or logits `(N, V)`, at the same N tokens.
        beta, temperature, chunk_size: see `head_jsd`.
        entropy: also measure the student's entropy, at τ.

    Returns:
        The scalar sum, differentiable in the student's hidden states, weight and bias, or its logits; and figures.

    Raises:
        ValueError: see `jsd`.
    """
    sides = [_Side.of(side) for side in (student, teacher)]
    _check(beta, temperature, *(side.vocabulary for side in sides))
    _check_same_tokens(sides[0].rows, sides[1].rows)
    size = chunk_size or default_chunk_size(sides[0].vocabulary, sides[0].rows.shape[1])
    own, asked = sides[0], _Asked(beta, temperature, entropy, size)
    total, *figures = _HeadJSDSum.apply(own.rows, own.weight, own.bias, own, sides[1], asked)
    return total, DistillationStats(*figures)


def common_tokens(student: Head | Tensor, teacher: Head | Tensor) -> tuple[Head | Tensor, Head | Tensor]:
    """Both heads, or logits `(N, V)`, cut to the tokens that both have: those behind are one head's padding."""
    size = min(_Side.of(student).vocabulary, _Side.of(teacher).vocabulary)

    def cut(side: Head | Tensor) -> Head | Tensor:
        if _Side.of(side).vocabulary == size:
            return side
        if isinstance(side, Tensor):
            return side[:, :size]
        return side._replace(weight_VH=side.weight_VH[:size], bias=None if side.bias is None else side.bias[:size])

    return cut(student), cut(teacher)


class _Asked(NamedTuple):
    """What is to be computed, and of how many rows at once."""

    beta: float
    temperature: float
    entropy: bool
    chunk_size: int


class _Side(NamedTuple):
    """A head that is applied to rows of hidden states, or rows of logits, where there is no weight."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    transform: HeadTransform
    dtype: torch.dtype  # of the matrix products

    @classmethod
    def of(cls, side: Head | Tensor) -> _Side:
        transform = HeadTransform()
        if isinstance(side, Tensor):
            return cls(side, None, None, transform, side.dtype)
        dtype = Plan.of(side.hidden_NH, transform, None, entropy=False, collision=False).dtype
        return cls(side.hidden_NH, side.weight_VH, side.bias, side.transform or transform, dtype)

    @property
    def vocabulary(self) -> int:
        return self.rows.shape[1] if self.weight is None else self.weight.shape[0]

    def logits(self, part: slice = ALL) -> tuple[Tensor, Tensor | float]:
        """Logits `(n, V)` of some rows after the transform, in float32 at least, and their slope in the head's own."""
        if self.weight is None:
            return _wide(self.rows[part]), 1.0
        bias = None if self.bias is None else self.bias.to(self.dtype)
        product = _wide(F.linear(self.rows[part].to(self.dtype), self.weight.to(self.dtype), bias))
        scale, softcap, temperature = self.transform.scale, self.transform.softcap, self.transform.temperature
        if softcap is None:
            return product * (scale / temperature), scale / temperature
        bent = (product * (scale / softcap)).tanh_()
        return bent * (softcap / temperature), (1 - bent.square()) * (scale / temperature)


class _HeadJSDSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, own: _Side, other: _Side, asked: _Asked
    ):
        with no_autocast(rows):
            sums = _Sums(own, ctx.needs_input_grad[:3])
            figures: list[tuple[Tensor, Tensor, Tensor | None]] = []
            for start in range(0, max(len(rows), 1), asked.chunk_size):
                part = slice(start, min(start + asked.chunk_size, len(rows)))
                logits, slope = own.logits(part)
                logp = (logits / asked.temperature).log_softmax(-1)
                target, _ = other.logits(part)
                agrees = logits.argmax(-1) == target.argmax(-1)
                values, gradient = _with_gradient(logp, (target / asked.temperature).log_softmax(-1), asked.beta)
                figures.append((values, agrees, -(logp.exp() * logp).nan_to_num().sum(-1) if asked.entropy else None))
                if any(ctx.needs_input_grad[:3]):
                    sums.add(part, gradient.mul_(slope / asked.temperature))
        ctx.gradients, ctx.dtypes = sums.gradients, [None if t is None else t.dtype for t in (rows, weight, bias)]
        values, agrees, entropy = (None if f[0] is None else torch.cat(f) for f in zip(*figures, strict=True))
        ctx.mark_non_differentiable(values, agrees, *(() if entropy is None else (entropy,)))
        return values.sum(), values, agrees, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("head_jsd_sum was differentiated before, which used up its gradients. Call it again.")
        stored, ctx.gradients = ctx.gradients, None
        given = [None if g is None else g.mul_(gradient).to(d) for g, d in zip(stored, ctx.dtypes, strict=True)]
        return *given, None, None, None


class _Sums:
    """The gradients of rows, weight and bias, chunk by chunk; in float32 where the products are in half precision."""

    def __init__(self, side: _Side, needs: Sequence[bool]):
        self.side, wide = side, side.dtype if side.dtype == torch.float64 else torch.float32
        found = zip((side.rows, side.weight, side.bias), needs, strict=True)
        self.gradients = [torch.zeros_like(t, dtype=wide) if need else None for t, need in found]

    def add(self, part: slice, gradient: Tensor) -> None:
        rows, weight, bias = self.gradients
        if self.side.weight is None:
            rows[part] = gradient
            return
        if bias is not None:
            bias += gradient.sum(0)
        gradient = gradient.to(self.side.dtype)
        if rows is not None:
            rows[part] = (gradient @ self.side.weight.to(self.side.dtype)).to(rows.dtype)
        if weight is not None and gradient.dtype == weight.dtype:
            weight.addmm_(gradient.t(), self.side.rows[part].to(gradient.dtype))
        elif weight is not None:
            weight += gradient.t() @ self.side.rows[part].to(gradient.dtype)


def _with_gradient(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of log-probabilities `(n, V)`, and its gradient in what the student's are the log-softmax of."""
    values = _divergence(student, teacher, beta)
    q = student.exp()
    if beta == 0:
        return values, q.sub_(teacher.exp())
    student, teacher = student.clamp_min(LEAST_LOG_PROB), teacher.clamp_min(LEAST_LOG_PROB)
    factor = (student - (teacher if beta == 1 else _mixture(student, teacher, beta))) * (1 if beta == 1 else 1 - beta)
    mean = (q * factor).sum(-1, keepdim=True)
    return values, factor.sub_(mean).mul_(q)


def _by_chunks(rows: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, size: int) -> Tensor:
    _check_same_tokens(student, teacher)
    if not len(student):
        return rows(student, teacher)
    chunks = zip(student.split(size), teacher.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([rows(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(rows, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of log-probabilities `(n, V)`."""
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    student, teacher = student.clamp_min(LEAST_LOG_PROB), teacher.clamp_min(LEAST_LOG_PROB)
    mixture = _mixture(student, teacher, beta)
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(-1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_same_tokens(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(f"Student and teacher must see the same tokens: {len(student)} and {len(teacher)}.")


def _check(beta: float, temperature: float, student: int, teacher: int) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"The β of a Jensen-Shannon divergence must be in [0, 1], {beta!r} was given.")
    if not temperature > 0:
        raise ValueError(f"The temperature must be a positive number, {temperature!r} was given.")
    if student != teacher:
        raise ValueError(
            f"Student and teacher must have one vocabulary: {student} and {teacher} tokens. Where one head is only "
            "padded, cut its weight to the tokens of both."
        )
