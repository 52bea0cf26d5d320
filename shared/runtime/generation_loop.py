"""The decoding loop: prompts run once, their cache copied to the groups, finished rows out of the batch.

It speaks to the model as its own `forward` does, with a batch of one token a row. It does not know of a whole call:
chunks of rows, engines that shard weights and models that cannot be run so are seen to in `shared.runtime.generation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.runtime.generation_cache import expanded, is_full, select
from shared.runtime.generation_sampling import Drawer, StopStrings, lengths_by_ends

# Cutting rows out copies the cache of those that stay: a finished row rides along until there are so many of them.
_SHARE = 0.25
DIVERGED = (
    "The model's logits are not numbers (NaN): it has diverged, or its weights are broken. Go on from an earlier "
    "checkpoint with a lower learning_rate or max_grad_norm; float16 weights may need bfloat16."
)
# Tokens between looks at what has finished, where a look makes the device wait or text is decoded.
_EVERY = 4


def split_extras(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What stands beside the prompts' tokens, `(P, L, ...)` (token_type_ids), and all else (images)."""
    shape = inputs["input_ids"].shape
    extras = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask") and v is not None}
    along = {k: v for k, v in extras.items() if isinstance(v, Tensor) and v.shape[:2] == shape}
    return along, {k: v for k, v in extras.items() if k not in along}


def rows_of(inputs: dict[str, Any], prompts: Tensor) -> dict[str, Any]:
    """Some prompts; what does not stand beside tokens is left out."""
    along, _ = split_extras(inputs)
    columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **along}
    return {k: v[prompts] for k, v in columns.items()}


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompts without the columns that are padding in each of them."""
    left = inputs["input_ids"].shape[1] - int(inputs["attention_mask"].sum(1).max())
    along, others = split_extras(inputs)
    columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **along}
    return {k: v[:, left:] for k, v in columns.items()} | others


@dataclass(frozen=True)
class Past:
    """What the next token of each of R rows needs of those before it."""

    cache: Any
    mask: Tensor | None  # (R, L + T), of which as many columns count as there are tokens; None: nothing is padding
    width: int
    positions: Tensor | None  # (R, 1), of the next token
    beside: dict[str, Tensor]  # (R, 1, ...)

    @property
    def is_full(self) -> bool:
        """Whether the cache is copied with the next token, so that rows can leave at no cost."""
        return is_full(self.cache)

    def expand(self, prompts: Tensor, group: int, tokens: int, *, keep: bool) -> Past:
        """For the completions, of at most so many tokens, of some prompts `(P,)`; see `expanded`."""

        def spread(values: Tensor) -> Tensor:
            return values[prompts].repeat_interleave(group, 0)

        return replace(
            self,
            cache=expanded(self.cache, prompts, group, tokens, keep=keep),
            mask=None if self.mask is None else spread(nn.functional.pad(self.mask, (0, tokens), value=1)),
            positions=None if self.positions is None else spread(self.positions),
            beside={k: spread(v) for k, v in self.beside.items()},
        )

    def select(self, rows: Tensor) -> Past:
        select(self.cache, rows)
        return replace(
            self,
            mask=None if self.mask is None else self.mask[rows],
            positions=None if self.positions is None else self.positions[rows],
            beside={k: v[rows] for k, v in self.beside.items()},
        )


class Passes:
    """A model's passes over prompts and over single tokens.

    Args:
        model: what is called; an engine's hooks and PEFT's wrapper are part of it.
        inner: the transformers model in it.
    """

    def __init__(self, model: nn.Module, inner: nn.Module):
        self._model = model
        self._body = getattr(inner, inner.base_model_prefix, inner)
        takes = inspect.signature(type(inner).forward).parameters
        self._takes_positions = "position_ids" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # transformers has called it cache since 5.24
        self._cache = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self.takes_cache = self._cache is not None

    def prefill(self, inputs: dict[str, Any]) -> tuple[Tensor, Past]:
        """The prompts' last logits `(P, V)`, and their past."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        along, others = split_extras(inputs)
        # Vision models that rotate by image coordinates place the prompt's tokens themselves.
        own_positions = bool(others) and hasattr(self._body, "rope_deltas")
        where = {}
        if self._takes_positions and not own_positions:
            where["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **where, **self._last, **along, **others)
        positions = mask.sum(1, keepdim=True) if self._takes_positions else None
        if own_positions and positions is not None:
            positions = positions + self._body.rope_deltas.to(positions.device)
        return out.logits[:, -1], Past(
            cache=out[self._cache],
            mask=None if bool(mask.all()) else mask,
            width=ids.shape[1],
            positions=positions,
            beside={k: v[:, -1:] for k, v in along.items()},
        )

    def step(self, past: Past, tokens: Tensor) -> tuple[Tensor, Past]:
        """The logits `(R, V)` after one more token `(R,)` in each row, and the past with it."""
        width = past.width + 1
        where = {} if past.positions is None else {"position_ids": past.positions}
        out = self._model(
            input_ids=tokens[:, None],
            attention_mask=None if past.mask is None else past.mask[:, :width],
            use_cache=True,
            **{self._cache: past.cache},
            **where,
            **past.beside,
        )
        positions = None if past.positions is None else past.positions + 1
        return out.logits[:, -1], replace(past, width=width, positions=positions)


@dataclass
class Decoder:
    """How completions are made from prompts that have been run.

    Args:
        passes: of the model, or of a mixture; see shared.runtime.generation_mixture.
        drawer: chooses tokens.
        ends: `(E,)` end tokens, on the model's device.
        stops: stop strings.
        going_on: whether any process goes on, given whether this one has to; every process asks at the same tokens.
        together: processes have to run the same passes: where all rows are finished, one goes on for company.
    """

    passes: Passes
    drawer: Drawer
    ends: Tensor
    stops: StopStrings
    going_on: Callable[[bool], bool]
    together: bool = False

    def run(
        self, logits: Tensor, past: Past, uniforms: Tensor, seen: Tensor | None, *, idle: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Complete each of P prompts G times.

        Args:
            logits: `(P, V)` at the last tokens of the prompts.
            past: of the B = P*G rows.
            uniforms: `(B, T)` a number for each draw; T is the longest completion.
            seen: `(P, V)` bool, the prompts' tokens where the repetition penalty needs them.
            idle: the rows are but company for other processes: finished before they begin.

        Returns:
            Tokens `(B, S)`, their log-probabilities, the rows' lengths `(B,)` and whether they finished, all on the
            CPU; S <= T tokens were drawn.

        Raises:
            UserError: the model's logits are not numbers.
        """
        rows, most = uniforms.shape
        group = rows // len(logits)
        drawn = self.drawer.draw(logits, uniforms[:, 0].view(-1, group), seen)
        current, logp = (each.flatten() for each in drawn)
        seen = None if seen is None else seen.repeat_interleave(group, 0)
        record = _Record(rows, most, current, logp, self.ends, self.stops)
        if idle:
            record.done[:] = True
        every = _EVERY if self.stops or current.device.type != "cpu" else 1
        written = 1
        for at in range(1, most):
            if at % every == 0:
                finished = record.count_finished(at)
                if not self.going_on(finished < len(record.index)):
                    break
                # where the cache is copied anyway, leaving is free
                worth = finished and (finished >= _SHARE * len(record.index) or past.is_full)
                if worth and (stay := record.staying(self.together)) is not None:
                    past, uniforms, current = past.select(stay), uniforms[stay], current[stay]
                    seen = None if seen is None else seen[stay]
            if seen is not None:
                seen.scatter_(1, current[:, None], True)
            logits, past = self.passes.step(past, current)
            current, logp = (each[:, 0] for each in self.drawer.draw(logits, uniforms[:, at : at + 1], seen))
            record.write(at, current, logp)
            written = at + 1
        made = record.results(written)
        if bool(made[1].isnan().any()):
            raise UserError(DIVERGED)
        return made


class _Record:
    """What was drawn for B rows, of which `index` are still in the batch."""

    def __init__(self, rows: int, most: int, current: Tensor, logp: Tensor, ends: Tensor, stops: StopStrings):
        self._tokens = current.new_zeros(rows, most)
        self._logp = logp.new_zeros(rows, most)
        self._ends, self._stops, self._checked = ends, stops, 0
        self._stopped = torch.full((rows,), most + 1, device=current.device)
        self.index = torch.arange(rows, device=current.device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=current.device)
        self._seen = torch.zeros(rows, dtype=torch.bool, device=current.device)  # done when last looked at
        self.write(0, current, logp)

    def write(self, at: int, current: Tensor, logp: Tensor) -> None:
        whole = len(self.index) == len(self._tokens)
        self._tokens[slice(None) if whole else self.index, at] = current
        self._logp[slice(None) if whole else self.index, at] = logp
        self.done |= torch.isin(current, self._ends)

    def count_finished(self, written: int) -> int:
        if self._stops:
            # a row that an end token has ended since may have completed a stop string before
            new = self.index[~self._seen]
            ends = self._stops.ends(self._tokens[new, :written], self._checked)
            lengths = [self._tokens.shape[1] + 1 if end is None else end for end in ends]
            self._stopped[new] = torch.tensor(lengths, dtype=torch.long, device=new.device)
            self.done |= self._stopped[self.index] <= written
            self._seen, self._checked = self.done.clone(), written
        return int(self.done.sum())

    def staying(self, one_at_least: bool) -> Tensor | None:
        """Which rows of the batch stay in it; None where all do."""
        stay = (~self.done).nonzero().squeeze(1)
        if not len(stay) and one_at_least:
            stay = torch.zeros(1, dtype=torch.long, device=stay.device)
        if len(stay) == len(self.index):
            return None
        self.index, self.done, self._seen = self.index[stay], self.done[stay], self._seen[stay]
        return stay

    def results(self, written: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._stops:
            self.count_finished(written)
        tokens = self._tokens[:, :written].cpu()
        lengths, finished = lengths_by_ends(tokens, self._ends.cpu())
        stopped = self._stopped.cpu()
        return (
            tokens,
            self._logp[:, :written].cpu(),
            torch.minimum(lengths, stopped),
            finished | (stopped <= written),
        )
