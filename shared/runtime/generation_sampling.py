"""How the next token is chosen: settings, the draw itself, and where a completion ends.

The draw inverts the cumulative distribution at a uniform number that its caller gives for each row and token. So a
row's tokens depend on nothing but its own numbers and logits, whichever rows run beside it, on any device.

Nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError

_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Args:
        max_new_tokens: the longest completion, in tokens.
        temperature: divides the logits; 0: the most likely token, always.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens whose probabilities first add up to p; 1: all.
        min_p: only tokens at least this share as likely as the most likely one; None: all.
        repetition_penalty: tokens of the row so far, prompt included, have positive logits divided and negative ones
            multiplied by this; 1: nothing.
        stop: a completion ends with the token that completes one of these strings in it.

    Raises:
        UserError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "None (off) or from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
        )
        for name, fine, allowed in checks:
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be {allowed}.")
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise UserError(f"stop is {self.stop!r}; it has to be a sequence of strings that are not empty.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Drawer:
    """Draws tokens from logits, and gives their log-probabilities under the whole, unfiltered distribution.

    Penalty, suppression and filters come in transformers' order and with its meaning: repetition penalty, suppressed
    tokens, temperature, top-k, top-p, min-p.

    Args:
        sampling: the settings.
        suppressed: tokens that are never drawn; they count in the log-probabilities.
    """

    def __init__(self, sampling: Sampling, suppressed: Collection[int] = ()):
        self.sampling = sampling
        self.penalises = sampling.repetition_penalty != 1
        self._suppressed = sorted(suppressed)
        self._warpers = [] if sampling.greedy else _warpers(sampling)

    def seen(self, ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
        """`(P, V)` bool: the tokens of prompts `(P, L)`, of which the mask counts the real ones."""
        found = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
        return found.scatter_(1, ids.masked_fill(mask == 0, vocabulary), True)[:, :vocabulary].contiguous()

    def draw(self, logits: Tensor, uniforms: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens `(R, K)` and their log-probabilities, float32.

        Args:
            logits: `(R, V)`, of any floating type.
            uniforms: `(R, K)` float64 in [0, 1), one for each of the K independent draws from a row.
            seen: `(R, V)` bool, the tokens that the repetition penalty is for.
        """
        logits = logits.float()
        scaled = logits if self.sampling.temperature in (0, 1) else logits / self.sampling.temperature
        scores = self._scores(scaled, seen)
        if self.sampling.greedy:
            tokens = scores.argmax(-1, keepdim=True).expand(uniforms.shape)
        else:
            tokens = invert((scores - scores.amax(-1, keepdim=True)).exp_(), uniforms)
        return tokens, scaled.gather(1, tokens) - scaled.logsumexp(-1, keepdim=True)

    def _scores(self, scaled: Tensor, seen: Tensor | None) -> Tensor:
        scores = scaled
        if seen is not None and self.penalises:
            penalty = self.sampling.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self._suppressed:
            index = torch.tensor(self._suppressed, device=scores.device)
            scores = scores.index_fill(1, index[index < scores.shape[1]], -math.inf)
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores


def _warpers(sampling: Sampling) -> list[Any]:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(min_p=sampling.min_p))
    return warpers


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Where the cumulative sum of each row passes the uniform number's share of the row's total; `(R, K)`.

    Sums of blocks come first, then the sums within the one block: a running sum over a large vocabulary costs many
    times as much. They are in float64, since in float32 a vocabulary's tail would drown in rounding.

    Args:
        weights: `(R, V)` not negative, not all zero; a token of weight zero is never chosen.
        uniforms: `(R, K)` float64 in [0, 1).
    """
    rows, size = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    before = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms * before[:, -1:]
    # weights that are no numbers have no place: the last block, rather than one that is not there
    block = torch.searchsorted(before, target, right=True).clamp_(max=blocks.shape[1] - 1)
    target = target - torch.nn.functional.pad(before, (1, 0)).gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).cumsum(-1, dtype=torch.float64)
    # the two ways to sum a block can differ in the last digit
    target = torch.minimum(target[..., None], within[..., -1:] * (1 - 1e-15))
    return (block * _BLOCK + torch.searchsorted(within, target, right=True).squeeze(-1)).clamp_(max=size - 1)


def lengths_by_ends(tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """`(R,)` lengths of rows `(R, T)` up to and with their first end token, or T; and whether there is one."""
    found = torch.isin(tokens, ends)
    finished = found.any(1)
    return torch.where(finished, found.int().argmax(1) + 1, tokens.shape[1]), finished


class StopStrings:
    """Finds the token that completes a stop string in a completion, by decoding a few tokens at a time.

    Args:
        tokenizer: decodes; special tokens count as the text they are written as.
        stop: the strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # A token is a byte at least; some tokenizers have a few that are none.
        self._reach = max((len(each.encode()) for each in stop), default=0) + 8

    def __bool__(self) -> bool:
        return bool(self._stop)

    def ends(self, rows: Tensor, checked: int) -> list[int | None]:
        """How many tokens each row has when a stop string is complete; None where none is.

        Args:
            rows: `(R, T)` completions so far.
            checked: so many tokens at the start of each row are known to complete none.
        """
        start = max(0, checked - self._reach)
        tails = rows[:, start:].tolist()
        texts = self._decode(tails) if tails else []  # transformers takes none for one that is empty
        return [
            start + self._first(tail, checked - start) if self._holds(text) else None
            for tail, text in zip(tails, texts, strict=True)
        ]

    def _first(self, row: list[int], checked: int) -> int:
        found = (end for end in range(checked + 1, len(row)) if self._holds(self._decode([row[:end]])[0]))
        return next(found, len(row))

    def _holds(self, text: str) -> bool:
        return any(each in text for each in self._stop)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
