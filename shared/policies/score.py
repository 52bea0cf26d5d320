"""The policy of models that score: a reward for a row, or a class for some of its tokens.

It runs the body of a transformers classifier and applies the score head to the tokens that are asked for alone, inside
one call of the wrapped model, so that an engine's hooks gather body and head. Prompts run once for their groups where
the model can (prefix.py). The head runs in the type that it is held in, outside of autocast: the difference of two
rewards does not survive half precision.

A row's reward is read at its last token that is not the pad token, where transformers' classifiers read it too; what
the attention mask leaves out is never read, whatever its number.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.policies.base import GroupedBatch
from shared.policies.head_call import wrap_forward
from shared.policies.prefix import PrefixSharing, evaluating, shared_hidden, trimmed
from shared.policies.token import in_model_type, whole_rows

logger = logging.getLogger(__name__)

HEADS = ("score", "classifier")


@dataclass
class ScoreCall:
    """Which hidden states a taught model scores.

    Args:
        index: `(N,)` positions in the flattened hidden states: `(B, T)` of whole rows, `(B, 1+T)` of shared prompts.
        shared: prompts and completions to be run apart; None: the rows of the call.
        half: said by the model: whether half precision took part.
        head: in the place of the model's own.
    """

    index: Tensor
    shared: GroupedBatch | None = None
    half: bool = False
    head: nn.Module | None = None


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model, without PEFT's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> nn.Module | None:
    """The head of a transformers classifier; None where it has none by a known name."""
    inner = inner_model(model)
    heads = (getattr(inner, name, None) for name in HEADS)
    return next((head for head in heads if isinstance(head, nn.Module)), None)


def tokens_to_last(ids: Tensor, attention: Tensor, pad: int | None) -> Tensor:
    """`(B,)` tokens of each row up to where its reward is read: the last attended one that is not `pad`.

    Args:
        ids, attention: `(B, T)`, right-padded.
        pad: the pad token's number in the model's configuration; None: no token is one.
    """
    real = attention.bool()
    if pad is not None:
        real = real & (ids != pad)
    return (real * torch.arange(1, 1 + ids.shape[1], device=ids.device)).amax(1)


class ScorePolicy:
    """Scores under a transformers model for sequence or token classification.

    Args:
        model: the model, or a PEFT model around it. It is taught, in place, to answer `model(..., score_call=…)`;
            every other call goes on as before. A model whose own forward gives other scores is run by that.
        share_prefix: run each prompt once for its completions, where the model can and it saves work.
        head: a score head for a model with another one, or none; it is no part of the model. Such a model has no
            scores of its own to fall back to: see `taught`.
        pad: with a head, the number of the pad token that the scores were learnt with; None: no token is one.

    Attributes:
        taught: whether the model answers a `score_call`.
    """

    def __init__(
        self, model: nn.Module, *, share_prefix: bool = True, head: nn.Module | None = None, pad: int | None = None
    ):
        inner = inner_model(model)
        self.head = head
        self.pad: int | None = inner.config.get_text_config().pad_token_id if head is None else pad
        # prompt learning puts tokens of its own before each row
        learns_prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        self.taught = not learns_prompt and _teach(inner, head)
        self._checked = not self.taught or head is not None
        self.sharing = PrefixSharing(inner, _body(inner, head), enabled=share_prefix and self.taught)

    def rewards(self, model: nn.Module, batch: GroupedBatch) -> Tensor:
        """One score a row, `(B,)` float32, of a model with one label.

        Args:
            model: the model as the engine wraps it.
            batch: prompts and completions.
        """
        self._check(model, batch)
        shared = self.taught and self.sharing.applies(model, batch, functools.partial(self._figures, model))
        return self._rewards(model, batch, shared)[0]

    def class_scores(self, model: nn.Module, batch: GroupedBatch) -> Tensor:
        """The logits of the counted tokens, row by row: `(N, labels)` float32."""
        rows = whole_rows(batch)
        index = rows.completion_mask.flatten().nonzero().squeeze(1)
        self._check(model, rows)
        return self._run(model, rows, ScoreCall(index, head=self.head))

    def _figures(self, model: nn.Module, batch: GroupedBatch, shared: bool) -> tuple[Tensor, bool]:
        return self._rewards(model, batch, shared)

    def _rewards(self, model: nn.Module, batch: GroupedBatch, shared: bool) -> tuple[Tensor, bool]:
        if shared:
            rows = trimmed(batch)
            last = tokens_to_last(rows.completion_ids, rows.completion_attention, self.pad)
            at = torch.arange(rows.rows, device=last.device) * (1 + rows.completion_ids.shape[1]) + last
            call = ScoreCall(at, shared=in_model_type(model, rows), head=self.head)
        else:
            rows, at = self._last_of_rows(whole_rows(batch))
            call = ScoreCall(at, head=self.head)
        return self._run(model, rows, call).squeeze(1), call.half

    def _last_of_rows(self, rows: GroupedBatch) -> tuple[GroupedBatch, Tensor]:
        last = (tokens_to_last(rows.completion_ids, rows.completion_attention, self.pad) - 1).clamp(min=0)
        return rows, torch.arange(rows.rows, device=last.device) * rows.completion_ids.shape[1] + last

    def _run(self, model: nn.Module, rows: GroupedBatch, call: ScoreCall) -> Tensor:
        if call.shared is not None:
            return model(score_call=call)
        rows = in_model_type(model, rows)
        if self.taught:
            return model(**_inputs(rows), score_call=call)
        return _own(model(**_inputs(rows)).logits, call.index)

    def _check(self, model: nn.Module, batch: GroupedBatch) -> None:
        """Compare the taught model with the model's own forward, at the first use."""
        if self._checked:
            return
        self._checked = True
        rows = whole_rows(batch.member(0))  # of several completions, images would have to be handed over anew
        if not rows.model_inputs:  # one row alone has no padding that the model's own forward could take for text
            width = int(rows.completion_attention[0].sum())
            ids, ones = rows.completion_ids[:1, :width], rows.completion_attention[:1, :width]
            rows = GroupedBatch.of_rows(ids, attention=ones, mask=ones)
        elif self.pad is None:  # then transformers scores one row at a time, and which images are its own is not known
            return
        else:
            rows = replace(rows, completion_ids=rows.completion_ids.where(rows.completion_attention.bool(), self.pad))
        rows, index = self._last_of_rows(in_model_type(model, rows))
        call = ScoreCall(index)
        with evaluating(model):
            ours = model(**_inputs(rows), score_call=call)
            own = _own(model(**_inputs(rows)).logits, index)
        tolerance = (0.1 if call.half else 1e-3) * (1 + own.abs())
        self.taught = bool(((own - ours).abs() <= tolerance).all())
        if not self.taught:
            logger.warning(
                "%s does more between its last layer and its scores than apply its head: its own forward is used.",
                type(inner_model(model)).__name__,
            )


def _inputs(rows: GroupedBatch) -> dict[str, Any]:
    return {
        "input_ids": rows.completion_ids,
        "attention_mask": rows.completion_attention,
        "use_cache": False,
        **rows.model_inputs,
    }


def _own(logits: Tensor, index: Tensor) -> Tensor:
    """A classifier's own logits at `index`: it gives `(B, labels)`, read at the last token, or `(B, T, labels)`."""
    return (logits if logits.dim() == 2 else logits.flatten(0, 1)[index]).float()


def _body(inner: nn.Module, head: nn.Module | None = None) -> nn.Module | None:
    """The part below the head, where the head is applied to its last states and to nothing else."""
    body = getattr(inner, inner.base_model_prefix, None)
    return None if body is inner or hasattr(body, "pooler") or (head or head_of(inner)) is None else body


def _teach(inner: nn.Module, head: nn.Module | None = None) -> bool:
    """Teach a classifier to answer a ScoreCall; False where its shape does not allow it.

    As in shared.policies.token the forward of the instance is wrapped, so that whatever else handles the model goes on
    seeing transformers' class.
    """
    if _body(inner, head) is None:
        return False
    wrap_forward(inner, _score_forward, mark="takes_score_call")
    return True


def _score_forward(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, score_call: ScoreCall | None = None, **kwargs: Any):
        if score_call is None:
            return plain(self, *args, **kwargs)
        head, shared = score_call.head or head_of(self), score_call.shared
        body = _body(self, head)
        states = body(*args, **kwargs)[0] if shared is None else shared_hidden(body, shared)
        hidden = states.flatten(0, 1)[score_call.index]
        dropout = getattr(self, "dropout", None) if score_call.head is None else None
        if isinstance(dropout, nn.Dropout):  # token classifiers have one before their head
            hidden = dropout(hidden)
        *_, weight = head.parameters()  # where an adapter trains a copy of the head: the copy's
        score_call.half = hidden.dtype != torch.float32 or torch.is_autocast_enabled(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(weight.dtype)).float()

    return forward
