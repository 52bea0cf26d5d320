"""Divergences between a student's and a teacher's distribution of the next token, one value a token.

With p the teacher, q the student, both softmax(logits / τ), and m = β p + (1-β) q:

    JSD(β) = β KL(p ‖ m) + (1-β) KL(q ‖ m)        0 < β < 1
    JSD(0) = KL(p ‖ q), the forward divergence    JSD(1) = KL(q ‖ p), the reverse one

as GKD has it (Agarwal et al. 2023, arXiv:2306.13649): the ends are conventions, near them the formula tends to 0. No
gradient flows to the teacher. Distillation on whole sequences that the teacher wrote (Kim and Rush 2016,
arXiv:1606.07947) is their plain negative log-likelihood and needs nothing from here.

Rows are taken some at a time, and what is between logits and divergence, or between hidden states and divergence, is
computed again in the backward pass: the memory does not grow with the number of rows.

Dimension letters: N counted tokens, V vocabulary, H hidden size, n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared.objectives.head_chunks import HeadTransform, default_chunk_size

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
        logp = _log_softmax(_logits(student._replace(hidden_NH=own)), temperature)
        with torch.no_grad():
            target = _log_softmax(_logits(fixed._replace(hidden_NH=other)), temperature)
        return _divergence(logp, target, beta)

    return _by_chunks(rows, student.hidden_NH, fixed.hidden_NH, size)


def _by_chunks(rows: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, size: int) -> Tensor:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"Student and teacher must see the same tokens: {student.shape[0]} and {teacher.shape[0]}.")
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
    weight = student.new_tensor([beta, 1 - beta]).log()
    student, teacher = student.clamp_min(LEAST_LOG_PROB), teacher.clamp_min(LEAST_LOG_PROB)
    mixture = torch.logaddexp(teacher + weight[0], student + weight[1])
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def _logits(head: Head) -> Tensor:
    """`(n, V)`, in float32 at least, after the head's transform."""
    logits = _wide(F.linear(head.hidden_NH, head.weight_VH, head.bias))
    if head.transform is None:
        return logits
    scale, softcap, temperature = head.transform.scale, head.transform.softcap, head.transform.temperature
    logits = logits * scale if softcap is None else (logits * (scale / softcap)).tanh() * softcap
    return logits / temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(-1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


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
