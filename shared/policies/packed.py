"""Rows that hold several documents, as packing and padding-free batches make them: the documents stay apart.

A document must be answered for as if it stood alone: its tokens see no other document, and its positions start at 0.
Models are told so in one of two ways, and a test at the first use says which of them holds for the model at hand:

- by positions alone: transformers reads from `position_ids` that start anew, where no attention mask is given, that a
  row is packed, and builds its mask (or flash attention's document bounds) from that;
- by a block mask `(B, 1, T, T)`, for models that do not look at the positions when they build theirs (Falcon, OPT).

Neither holds for models with ALiBi biases (Bloom) or a running state (Mamba and its hybrids): those are refused.
Attention costs T² of the whole row under sdpa and eager, however short its documents; flash attention pays for the
documents only. It takes them in one row, which is made here. Flash attention has not been run by the tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.objectives.logprobs import TokenStats
from shared.policies.base import GroupedBatch, LogProbs
from shared.policies.prefix import evaluating
from shared.policies.token import TokenPolicy

logger = logging.getLogger(__name__)

POSITIONS = "position_ids"  # of a batch's model_inputs, `(B, T)`: marks rows of several documents
MASK = "attention_mask"
TEST_LENGTHS = (7, 4, 9)  # of the documents of the test at first use


class Isolation(StrEnum):
    """How a model is told where documents end."""

    POSITIONS = "positions"
    BLOCK_MASK = "block mask"


def refuse_learnt_prompt(adapter: Any, option: str) -> None:
    """Raise UserError where an adapter puts learnt tokens before each row: the documents in it get none.

    Args:
        adapter: a PEFT configuration, or None.
        option: what was asked for, for the message.
    """
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"{option}: {type(adapter).__name__} puts learnt tokens before a row, not before each document in it. "
            f"Leave {option} out, or train another kind of adapter (LoRA)."
        )


def refuse_running_state(model: nn.Module, option: str) -> None:
    """Raise UserError where a model's layers carry a state from token to token, which no mask stops.

    Args:
        model: a transformers model or a PEFT model around one.
        option: what was asked for, for the message.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    state = sorted(kind for kind in layers if "attention" not in kind or "linear" in kind)
    if state or getattr(inner, "_is_stateful", False):
        what = f"layers of kind {', '.join(state)}" if state else "layers with a running state"
        raise UserError(
            f"{option}: {type(inner).__name__} has {what}, which would carry one document into the next. "
            f"Leave {option} out for this model."
        )


def wants_one_row(model: nn.Module) -> bool:
    """Whether the model's attention keeps documents apart in a batch of one row only (flash attention)."""
    return "flash" in (model.config.get_text_config()._attn_implementation or "")


def starts(positions: Tensor) -> Tensor:
    """`(B, T)` bool, where a document begins."""
    return positions == 0


def one_row(batch: GroupedBatch) -> GroupedBatch:
    """All real tokens of a packed batch in one row `(1, N)`, in their order."""
    real = batch.completion_attention.bool()
    return replace(
        batch,
        prompt_ids=batch.prompt_ids[:1],
        prompt_mask=batch.prompt_mask[:1],
        completion_ids=batch.completion_ids[real][None],
        completion_attention=batch.completion_attention[real][None],
        completion_mask=batch.completion_mask[real][None],
        model_inputs={**batch.model_inputs, POSITIONS: batch.model_inputs[POSITIONS][real][None]},
    )


def block_mask(positions: Tensor) -> Tensor:
    """`(B, 1, T, T)` bool: which tokens each token sees, itself and those before it in its document."""
    document = starts(positions).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


class PackedPolicy(TokenPolicy):
    """A token policy that keeps the documents of packed rows apart. A batch is packed where it has `position_ids`.

    Args:
        model, options: as TokenPolicy.
        option: the option that packs, for messages.

    Raises:
        UserError: the model has a running state; at the first packed batch, that its documents cannot be kept apart.
    """

    def __init__(self, model: nn.Module, *, option: str = "packing", **options: Any):
        refuse_learnt_prompt(getattr(model, "active_peft_config", None), option)
        refuse_running_state(model, option)
        super().__init__(model, **options)
        self.option = option
        self.isolation: Isolation | None = None
        self._config = model.config.get_text_config()
        self.attention: str = self._config._attn_implementation
        self._one_row = wants_one_row(model)

    def action_objective(
        self, model: nn.Module, batch: GroupedBatch, objective: Callable, **options: Any
    ) -> tuple[Tensor, TokenStats]:
        """As TokenPolicy; the first token of each document is not counted, since nothing predicts it."""
        return super().action_objective(model, self._laid_out(model, batch), objective, **options)

    def log_probs(self, model: nn.Module, batch: GroupedBatch, **options: Any) -> LogProbs:
        """As TokenPolicy; the first token of each document is not counted, since nothing predicts it."""
        laid_out = self._laid_out(model, batch)
        found = super().log_probs(model, laid_out, **options)
        if laid_out.completion_ids.shape == batch.completion_ids.shape:
            return found
        real = batch.completion_attention.bool()

        def on_grid(values: Any) -> Any:
            return values.new_zeros(real.shape).masked_scatter(real, values) if isinstance(values, Tensor) else values

        return type(found)(**{name: on_grid(value) for name, value in vars(found).items()})

    def _laid_out(self, model: nn.Module, batch: GroupedBatch) -> GroupedBatch:
        """The batch as the model takes it; as it is where it is not packed."""
        if POSITIONS not in batch.model_inputs or MASK in batch.model_inputs:
            return batch
        if self.isolation is None:
            self.isolation = self._find_isolation(model, batch.completion_ids.device)
        return self._isolated(batch, self.isolation)

    def _isolated(self, batch: GroupedBatch, how: Isolation) -> GroupedBatch:
        if self._one_row:
            batch = one_row(batch)
        positions = batch.model_inputs[POSITIONS]
        mask = batch.completion_mask * ~starts(positions)
        visible = None if how is Isolation.POSITIONS else self._as_the_model_adds_it(block_mask(positions))
        # named here, the mask takes the place of the one that TokenPolicy makes of `completion_attention`
        return replace(batch, completion_mask=mask, model_inputs={**batch.model_inputs, MASK: visible})

    def _as_the_model_adds_it(self, visible: Tensor) -> Tensor:
        """sdpa takes truth values, whatever the number type; the other implementations add the mask to the scores."""
        if self.attention == "sdpa":
            return visible
        return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, torch.finfo(torch.float16).min)

    # ---- The test at first use ------------------------------------------------------------------------------------

    def _find_isolation(self, model: nn.Module, device: torch.device) -> Isolation:
        """The first way under which the model answers for documents in one row as for documents alone.

        All processes try the same tokens and agree on what they find: they must go on alike.
        """
        tried: dict[Isolation, str] = {}
        with evaluating(model):
            for how in self._ways():
                try:
                    tried[how] = self._what_leaks(model, how, device)
                except torch.OutOfMemoryError:
                    raise
                except (ValueError, RuntimeError, TypeError, IndexError) as error:  # a mask that it does not take
                    tried[how] = f"{type(error).__name__}: {error}"
                if not tried[how]:
                    break
        if not tried[how]:
            if how is not Isolation.POSITIONS:
                logger.warning("Documents in one row are kept apart by a block mask: the model ignores positions.")
            return how
        found = "; ".join(f"by {way}: {what}" for way, what in tried.items())
        raise UserError(
            f"{self.option}: with {self.attention} attention this model does not keep the documents of a row apart "
            f"({found}). Leave {self.option} out, or give another attn_implementation."
        )

    def _ways(self) -> list[Isolation]:
        # flash attention takes no block mask, and one mask for all layers would undo the windows that some have
        windows = getattr(self._config, "sliding_window", None) or getattr(self._config, "attention_chunk_size", None)
        return [Isolation.POSITIONS] if self._one_row or windows else list(Isolation)

    def _what_leaks(self, model: nn.Module, how: Isolation, device: torch.device) -> str:
        """How documents in a row differ from documents alone, in words; empty where they do not."""
        documents = _documents(self._config.vocab_size, seed=0)
        other = _documents(self._config.vocab_size, seed=1)

        alone, half = self._figures(model, _padded(documents).to(device), False)

        def in_a_row(*documents: Tensor) -> Tensor:
            batch = self._isolated(_packed(documents).to(device), how)
            return self._figures(model, batch, False)[0]

        together, changed = in_a_row(*documents), in_a_row(other[0], *documents[1:])
        later = slice(len(documents[0]) - 1, None)  # a document's first token is not counted
        worst = torch.stack([(together - alone).abs().max(), (together - changed)[later].abs().max()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        difference, leak = worst.tolist()
        if leak > (1e-2 if half else 1e-5):
            return f"one document moves the log-probabilities of the next by {leak:.2g}"
        if difference > (0.25 if half else 1e-3):
            return f"log-probabilities differ by {difference:.2g} from those of the documents alone"
        return ""


def _documents(vocabulary: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in TEST_LENGTHS]


def _packed(documents: Sequence[Tensor]) -> GroupedBatch:
    ids = torch.cat(list(documents))[None]
    positions = torch.cat([torch.arange(len(one)) for one in documents])[None]
    ones = torch.ones_like(ids)
    return GroupedBatch.of_rows(ids, attention=ones, mask=ones, model_inputs={POSITIONS: positions})


def _padded(documents: Sequence[Tensor]) -> GroupedBatch:
    ids = nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    real = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in documents], batch_first=True)
    return GroupedBatch.of_rows(ids, attention=real, mask=real)
