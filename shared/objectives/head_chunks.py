"""The language-model head over some rows at a time: softmax figures and gradients in buffers that all chunks share.

The machine behind `logprobs`, which says what it is for. Nothing here is known to autograd.

Dimension letters: N counted tokens, V vocabulary, H hidden size, n rows of one chunk.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Matrix products reach their full speed at some 256 rows, and from H / 4 rows on, accumulating the weight's gradient
# costs little beside computing it. Chunks below the element budget would be mere overhead.
_MIN_ROWS = 256
_ROWS_PER_HIDDEN = 0.25
_BUDGET_ELEMENTS = 2**24


@dataclass(frozen=True)
class HeadTransform:
    """What becomes of the head's output x before the softmax: `softcap * tanh(scale * x / softcap) / temperature`.

    Args:
        scale: multiplies (Cohere's `logit_scale`; Granite's `logits_scaling` divides, so 1 / it).
        softcap: bounds the logits to ±softcap (Gemma 2, `final_logit_softcapping`). None: `scale * x / temperature`.
        temperature: divides, last.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenStats(NamedTuple):
    """Figures of N tokens, float32 (float64 for float64 hidden states).

    Args:
        logp: `(N,)` log-probability of each target.
        entropy: `(N,)` entropy of each distribution, in nats; None where not asked for.
        correct: `(N,)` bool, whether no token was more likely than the target.
        collision: `(N,)` log of the chance that two draws agree, log Σ_v p_v²; None where not asked for.
        values: `(N,)` what a critic says of each token's state, of whoever asks one; no head gives them.
    """

    logp: Tensor
    entropy: Tensor | None
    correct: Tensor
    collision: Tensor | None = None
    values: Tensor | None = None


def default_chunk_size(vocabulary: int, hidden_size: int) -> int:
    """Rows of one chunk: its logits take at most some 64 MiB, or a quarter of the head's own weight, or 256 rows."""
    return max(_MIN_ROWS, int(hidden_size * _ROWS_PER_HIDDEN), _BUDGET_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class Plan:
    """How the head is applied, fixed when it is called: a backward pass may run under another autocast state."""

    transform: HeadTransform
    chunk_size: int | None
    entropy: bool
    collision: bool
    dtype: torch.dtype  # of the matrix products, as nn.Linear would choose it
    entropy_gradient: bool = False  # of `head_log_probs`: whether the entropy is differentiable

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        transform: HeadTransform,
        chunk_size: int | None,
        *,
        entropy: bool,
        collision: bool,
        entropy_gradient: bool = False,
    ) -> Plan:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        return cls(transform, chunk_size, entropy or entropy_gradient, collision, dtype, entropy_gradient)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(tensor.device.type, enabled=False)


class ChunkedHead:
    """The head over N tokens, with one set of buffers that all chunks use in turn.

    For each part in `parts`: `stats(part)`, then if wanted `add_gradients(part, d loss / d logp, d loss / d entropy)`,
    which works on what `stats` left in the buffers.

    Args:
        needs: whether the gradients of hidden, weight and bias are wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        plan: Plan,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ):
        self.plan, self.targets, self.needs = plan, targets.unsqueeze(1), needs
        self.hidden, self.weight = hidden.to(plan.dtype), weight.to(plan.dtype)
        self.bias = None if bias is None else bias.to(plan.dtype)
        self.parts = _parts(hidden.shape[0], plan.chunk_size or default_chunk_size(*weight.shape))
        self.exact = plan.dtype in (torch.float32, torch.float64)
        self.sum_dtype = plan.dtype if self.exact else torch.float32

        size = (max((p.stop - p.start for p in self.parts), default=0), weight.shape[0])
        # A fresh buffer for each chunk would cost as much as the softmax on a CPU: its pages are mapped anew.
        self._product = hidden.new_empty(size, dtype=plan.dtype)
        self._logits = self._product if self.exact else hidden.new_empty(size, dtype=torch.float32)
        self._spare = hidden.new_empty(size, dtype=self.sum_dtype) if plan.entropy else None

        # float16 holds no gradient as small as 1 / tokens: it stays in float32 until the loss scale has come in.
        stored = torch.float32 if plan.dtype == torch.float16 else hidden.dtype
        self.hidden_gradient = hidden.new_empty(hidden.shape, dtype=stored) if needs[0] else None
        self.weight_gradient: Tensor | None = None
        self.bias_gradient = hidden.new_zeros(weight.shape[0], dtype=self.sum_dtype) if needs[2] else None

    def all_stats(self) -> TokenStats:
        """The figures of all tokens, with no gradient work."""
        with torch.no_grad():
            collected = self.empty_stats()
            for part in self.parts:
                collected.put(part, self.stats(part))
            return collected.stats

    def empty_stats(self) -> _Collected:
        """Room for the figures of N tokens."""
        return _Collected(self.hidden.new_empty(self.hidden.shape[0], dtype=self.sum_dtype), self.plan)

    def stats(self, part: slice) -> TokenStats:
        """The figures of one chunk. Leaves its unnormalised softmax in the buffer for `add_gradients`."""
        targets, logits = self.targets[part], self._transformed(part)
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, targets)
        correct = chosen == top
        logits.sub_(top)
        if self._spare is None:
            self._exp = logits.exp_()
        else:
            self._exp = torch.exp(logits, out=self._spare[: logits.shape[0]])
        self._total = self._exp.sum(-1, keepdim=True)
        log_total = self._total.log()
        logp = (chosen - top).sub_(log_total).squeeze(1)
        entropy = collision = None
        if self.plan.collision:  # by the norm, which needs no buffer for the squares
            norm = torch.linalg.vector_norm(self._exp, dim=-1, keepdim=True)
            collision = norm.log().sub_(log_total).mul_(2).squeeze(1)
        if self._spare is not None:
            self._weighted = logits.mul_(self._exp)
            self._mean_logit = self._weighted.sum(-1, keepdim=True).div_(self._total)
            entropy = (log_total - self._mean_logit).squeeze(1)
        return TokenStats(logp, entropy, correct.squeeze(1), collision)

    def _transformed(self, part: slice) -> Tensor:
        """Logits `(n, V)` of one chunk after the transform, in the buffer; sets the transform's slope."""
        rows = part.stop - part.start
        product, logits = self._product[:rows], self._logits[:rows]
        if self.bias is None:
            torch.mm(self.hidden[part], self.weight.t(), out=product)
        else:
            torch.addmm(self.bias, self.hidden[part], self.weight.t(), out=product)
        if not self.exact:
            logits.copy_(product)

        transform = self.plan.transform
        self._slope: Tensor | float = transform.scale / transform.temperature
        if transform.softcap is not None:
            logits.mul_(transform.scale / transform.softcap).tanh_()
            if any(self.needs):
                self._slope = logits.square().neg_().add_(1).mul_(self._slope)
            logits.mul_(transform.softcap / transform.temperature)
        elif self._slope != 1:
            logits.mul_(self._slope)
        return logits

    def add_gradients(self, part: slice, logp_gradient: Tensor, entropy_gradient: Tensor | None = None) -> None:
        """Add what one chunk gives to the gradients, from `(n,)` d loss / d logp and, where given, d loss / d entropy.

        Times the transform's slope, with p the softmax of logits z:
        d logp / dz = onehot(target) - p, and d entropy / dz = -p (log p + entropy) = -p (z - Σ p z).
        """
        unit = None
        factors = [g.unsqueeze(1) for g in (logp_gradient, entropy_gradient) if g is not None]
        if self.plan.dtype == torch.float16:
            unit = torch.cat(factors).abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            factors = [factor / unit for factor in factors]
        if isinstance(self._slope, float):
            factors = [factor * self._slope for factor in factors]
        factor, of_exp = factors[0], -factors[0]
        if entropy_gradient is not None:
            of_exp = of_exp + factors[1] * self._mean_logit
        gradient = self._exp.mul_(of_exp / self._total)
        if entropy_gradient is not None:
            gradient.addcmul_(self._weighted, factors[1] / self._total, value=-1)
        gradient.scatter_add_(1, self.targets[part], factor)
        if isinstance(self._slope, Tensor):
            gradient.mul_(self._slope)
        if self.bias_gradient is not None:
            self.bias_gradient.add_(_scaled(gradient.sum(0), unit))
        if not self.exact:
            gradient = self._product[: gradient.shape[0]].copy_(gradient)
        if self.hidden_gradient is not None:
            self.hidden_gradient[part] = _scaled(gradient @ self.weight, unit)
        if self.needs[1]:
            self._add_weight_gradient(gradient, self.hidden[part], unit)

    def _add_weight_gradient(self, gradient: Tensor, hidden: Tensor, unit: Tensor | None) -> None:
        if self.weight_gradient is None:
            product = _scaled(gradient.t() @ hidden, unit)
            self.weight_gradient = product.to(self.sum_dtype) if len(self.parts) > 1 else product
        elif self.exact:
            self.weight_gradient.addmm_(gradient.t(), hidden)
        else:
            self.weight_gradient.add_(_scaled(gradient.t() @ hidden, unit))

    def gradients(self) -> list[Tensor | None]:
        """The gradients of hidden, weight and bias; None where not wanted."""
        if self.needs[1] and self.weight_gradient is None:  # no token was counted
            self.weight_gradient = torch.zeros_like(self.weight)
        return [self.hidden_gradient, self.weight_gradient, self.bias_gradient]


class _Collected:
    """The figures of N tokens, filled chunk by chunk."""

    def __init__(self, logp: Tensor, plan: Plan):
        entropy = torch.empty_like(logp) if plan.entropy else None
        collision = torch.empty_like(logp) if plan.collision else None
        self.stats = TokenStats(logp, entropy, torch.empty_like(logp, dtype=torch.bool), collision)

    def put(self, part: slice, values: TokenStats) -> None:
        for into, value in zip(self.stats, values, strict=True):
            if into is not None:
                into[part] = value


def _parts(count: int, size: int) -> list[slice]:
    """Slices of nearly equal length, at most `size` long, that cover `count` items."""
    pieces = -(-count // size)
    return [slice(i * count // pieces, (i + 1) * count // pieces) for i in range(pieces)]


def _scaled(values: Tensor, unit: Tensor | None) -> Tensor:
    return values if unit is None else values.float().mul_(unit)
