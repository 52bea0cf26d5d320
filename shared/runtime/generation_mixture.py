"""Models that write together: the next token is from the geometric mixture of their distributions.

To the decoding loop a mixture is one model: its passes are those of all its parts, each with a cache of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.runtime.generation_loop import Passes, Past


@dataclass(frozen=True)
class Part:
    """One model of a mixture.

    Args:
        model: as the trainer calls it.
        weight: the power that its probabilities are raised to.
        around: gives what surrounds each of its passes, such as an adapter's switch where a model is there twice.
    """

    model: nn.Module
    weight: float = 1.0
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def inner(self) -> nn.Module:
        """The transformers model in it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


@dataclass(frozen=True)
class Mixture:
    """Models of one vocabulary whose probabilities are multiplied, `p ∝ Π p_i^w_i`, token by token.

    A temperature divides the logits of all: it is as if each part had it. Where the parts have embeddings of unlike
    numbers of tokens, those that all of them know are written, one of weight 0 included.

    Args:
        parts: the models; one of weight 0 is not run. What ends a completion is by the first that is.

    Raises:
        UserError: a weight is negative or no number, or all of them are 0.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        weights = [part.weight for part in self.parts]
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise UserError(f"The weights of a mixture are {weights}: they must be at least 0, and not all of them 0.")


def parts_of(model: nn.Module | Mixture) -> tuple[Part, ...]:
    """What writes: the parts of a mixture that count, or a model alone."""
    if isinstance(model, Mixture):
        return tuple(part for part in model.parts if part.weight)
    return (Part(model),)


def unknown_tokens(model: nn.Module | Mixture) -> range:
    """What a mixture could write, and one of its parts, of weight 0, has no embedding for."""
    if not isinstance(model, Mixture):
        return range(0)
    return range(_tokens(model.parts), _tokens(parts_of(model)))


def _tokens(parts: tuple[Part, ...]) -> int:
    # by the configuration: an engine may have cut up the weights
    return min(part.inner.config.get_text_config().vocab_size for part in parts)


def passes_of(parts: tuple[Part, ...]) -> Passes | MixedPasses:
    """The passes of what writes."""
    if len(parts) == 1 and parts[0].around is contextlib.nullcontext:
        return Passes(parts[0].model, parts[0].inner)
    return MixedPasses(parts)


@dataclass(frozen=True)
class Pasts:
    """The pasts of all parts, which are gone on with together; see Past."""

    parts: tuple[Past, ...]

    @property
    def is_full(self) -> bool:
        return any(past.is_full for past in self.parts)

    def expand(self, prompts: Tensor, group: int, tokens: int, *, keep: bool) -> Pasts:
        return Pasts(tuple(past.expand(prompts, group, tokens, keep=keep) for past in self.parts))

    def select(self, rows: Tensor) -> Pasts:
        return Pasts(tuple(past.select(rows) for past in self.parts))


class MixedPasses:
    """The parts' passes, one after another, with their logits put together; see Passes."""

    def __init__(self, parts: tuple[Part, ...]):
        self._parts = [(part, Passes(part.model, part.inner)) for part in parts]

    def prefill(self, inputs: dict[str, Any]) -> tuple[Tensor, Pasts]:
        made = []
        for part, passes in self._parts:
            with part.around():
                made.append(passes.prefill(inputs))
        return self._mixed(made)

    def step(self, past: Pasts, tokens: Tensor) -> tuple[Tensor, Pasts]:
        made = []
        for (part, passes), own in zip(self._parts, past.parts, strict=True):
            with part.around():
                made.append(passes.step(own, tokens))
        return self._mixed(made)

    def _mixed(self, made: list[tuple[Tensor, Past]]) -> tuple[Tensor, Pasts]:
        known = min(logits.shape[-1] for logits, _ in made)
        weighted = [
            part.weight * logits[..., :known].float() for (part, _), (logits, _) in zip(self._parts, made, strict=True)
        ]
        return torch.stack(weighted).sum(0), Pasts(tuple(past for _, past in made))
