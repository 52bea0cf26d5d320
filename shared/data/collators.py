"""Tokenised rows to batches: padding, masks, and what the objective needs beside the tokens.

Rows that only fill up a process's share of an evaluation count nothing: their mask is 0, and `columns["counted"]`
`(P,)` is False for them. What was done to a row of a stream travels in the batch's notes.

Deliberately not here: tokenising, packing, and images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.data.rows import PADDING, ROW
from shared.data.tokens import NOTE
from shared.errors import UserError
from shared.policies.base import GroupedBatch

Row = Mapping[str, Any]


class SupervisedCollator:
    """Whole rows, right-padded; packed rows and padding-free batches with their documents told apart.

    In the latter two `model_inputs["position_ids"]` `(B, T)` starts again at each document, and `columns["document"]`
    `(B, T)` is the document's number in its row, −1 at padding. No document's first token is learnt.

    Args:
        pad_id: the token to pad with.
        padding_free: put all rows of a batch one after the other into a single row.
        pad_to_multiple_of: pad T to a multiple of this.
    """

    def __init__(self, pad_id: int, *, padding_free: bool = False, pad_to_multiple_of: int | None = None):
        self.pad_id, self.padding_free, self.multiple = pad_id, padding_free, pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> GroupedBatch:
        """Collate rows of `input_ids` and `learnt`, packed ones with the `lengths` of their documents."""
        ids = [row["input_ids"] for row in rows]
        learnt = [np.asarray(row["learnt"], bool) & (not row.get(PADDING)) for row in rows]
        counted = [not row.get(PADDING) for row in rows]
        documents = None
        if self.padding_free or "lengths" in rows[0]:
            documents = [np.asarray(row.get("lengths", [len(row["input_ids"])])) for row in rows]
        if self.padding_free:
            ids, learnt, counted = [np.concatenate(ids)], [np.concatenate(learnt)], [any(counted)]
            documents = [np.concatenate(documents)]
        lengths = [len(row) for row in ids]
        width = _width(lengths, self.multiple)
        mask = _padded(learnt, width, False)
        batch = GroupedBatch.of_rows(
            _padded(ids, width, self.pad_id), attention=_attention(lengths, width), mask=mask.long()
        )
        batch.columns["counted"] = torch.tensor(counted)
        if documents is not None:
            positions = [np.concatenate([np.arange(n) for n in each]) for each in documents]
            # Padding counts on from 0: to a kernel that reads the positions it is one more document.
            rest = [np.arange(width - length) for length in lengths]
            whole = [np.concatenate(pair) for pair in zip(positions, rest, strict=True)]
            batch.model_inputs["position_ids"] = _padded(whole, width, 0)
            numbers = [np.repeat(np.arange(len(each)), each) for each in documents]
            batch.columns["document"] = _padded(numbers, width, -1)
            batch.completion_mask[batch.model_inputs["position_ids"] == 0] = 0
        batch.notes = _notes(rows)
        return batch


class PairCollator:
    """Preference pairs: `group_size` 2, the rows `[chosen_0, rejected_0, chosen_1, …]` on shared prompts.

    `columns` has `margin` `(P,)` where the rows have one, and `ref_logp` `(B, T)`, 0 at padding, where they have
    `chosen_ref_logp` and `rejected_ref_logp`, one log-probability a token.

    Args:
        pad_id: the token to pad with.
        pad_to_multiple_of: pad L and T to multiples of this.
    """

    def __init__(self, pad_id: int, *, pad_to_multiple_of: int | None = None):
        self.pad_id, self.multiple = pad_id, pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> GroupedBatch:
        """Collate rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        answers = [row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]
        counted = [not row.get(PADDING) for row in rows]
        batch = _grouped(rows, answers, counted, 2, self.pad_id, self.multiple)
        margins = [row.get("margin") for row in rows]
        if any(margin is not None for margin in margins):
            batch.columns["margin"] = torch.tensor([float(margin or 0.0) for margin in margins])
        if "chosen_ref_logp" in rows[0]:
            logps = [row[name] for row in rows for name in ("chosen_ref_logp", "rejected_ref_logp")]
            batch.columns["ref_logp"] = _padded(logps, batch.completion_ids.shape[1], 0.0)
        return batch


class UnpairedCollator:
    """Single answers with a label: `columns["label"]` `(P,)` bool.

    With `kl`, `group_size` is 2: each prompt's own answer, and the answer of the next row of the batch, which
    estimates how far the policy is from the reference. `columns` has `density_ratio` `(P,)` where the rows have it,
    and `ref_logp` `(P, T)`, of the own answers alone, where they have `completion_ref_logp`.

    Args:
        pad_id: the token to pad with.
        kl: add those pairs.
        lone_row: what to do with a batch in which a row has no other to pair with: `error`, or `uncounted`, its pair
            then counting nothing, as the last batch of an evaluation may need. `columns["kl_counted"]` `(P,)` says
            which pairs count.
        max_length: those pairs' answers are cut to it, prompt and answer together: both rows fit, but not each
            prompt with another row's answer.
        pad_to_multiple_of: pad L and T to multiples of this.
    """

    def __init__(
        self,
        pad_id: int,
        *,
        kl: bool,
        lone_row: str = "error",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.max_length = max_length
        if lone_row not in ("error", "uncounted"):
            raise UserError(f"lone_row is {lone_row!r}; allowed: error, uncounted.")
        self.pad_id, self.kl, self.lone_row, self.multiple = pad_id, kl, lone_row, pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> GroupedBatch:
        """Collate rows of `prompt_ids`, `completion_ids` and `label`.

        Raises:
            UserError: a batch of one row, with `kl` and `lone_row="error"`.
        """
        counted = [not row.get(PADDING) for row in rows]
        answers = [row["completion_ids"] for row in rows]
        if self.kl:
            others = self._others(counted)
            answers = [each for at, other in enumerate(others) for each in (answers[at], self._cut(rows, at, other))]
        batch = _grouped(rows, answers, counted, 1 + self.kl, self.pad_id, self.multiple)
        batch.columns["label"] = torch.tensor([bool(row["label"]) for row in rows])
        if self.kl:
            paired = torch.tensor(
                [use and other != at for at, (use, other) in enumerate(zip(counted, others, strict=True))]
            )
            batch.completion_mask[1::2] *= paired.unsqueeze(1)
            batch.columns["kl_counted"] = paired
        if "density_ratio" in rows[0]:
            batch.columns["density_ratio"] = torch.tensor([float(row["density_ratio"]) for row in rows])
        if "completion_ref_logp" in rows[0]:
            logps = [row["completion_ref_logp"] for row in rows]
            batch.columns["ref_logp"] = _padded(logps, batch.completion_ids.shape[1], 0.0)
        return batch

    def _cut(self, rows: Sequence[Row], at: int, other: int) -> np.ndarray:
        """Another row's answer, as long as it may be behind this row's prompt."""
        answer = rows[other]["completion_ids"]
        if self.max_length is None:
            return answer
        return answer[: max(1, self.max_length - len(rows[at]["prompt_ids"]))]

    def _others(self, counted: Sequence[bool]) -> list[int]:
        """For each row the next one that is counted."""
        real = [at for at, use in enumerate(counted) if use]
        if len(real) == 1 and self.lone_row == "error":
            raise UserError(
                "A batch has one row, and its answer can be paired with no other: the KL term pairs each prompt with "
                "the answer of another row of the batch. Set the batch size per device to 2 or more, and drop a "
                "smaller last batch (dataloader_drop_last)."
            )
        following = dict(zip(real, [*real[1:], *real[:1]], strict=True))
        return [following.get(at, at) for at in range(len(counted))]


class StepCollator:
    """Stepwise rows: `columns["step_labels"]` `(B, T)` is 1 or 0 at each step's last token and −100 elsewhere.

    The completion mask is 1 at those tokens.

    Args:
        pad_id: the token to pad with.
        pad_to_multiple_of: pad T to a multiple of this.
    """

    def __init__(self, pad_id: int, *, pad_to_multiple_of: int | None = None):
        self.pad_id, self.multiple = pad_id, pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> GroupedBatch:
        """Collate rows of `input_ids`, `step_ends` and `step_labels`."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = _width(lengths, self.multiple)
        counted = torch.tensor([not row.get(PADDING) for row in rows])
        labels = torch.full((len(rows), width), -100)
        for at, row in enumerate(rows):
            if counted[at]:
                labels[at, torch.from_numpy(np.asarray(row["step_ends"], np.int64))] = torch.from_numpy(
                    np.asarray(row["step_labels"], np.int64)
                )
        batch = GroupedBatch.of_rows(
            _padded([row["input_ids"] for row in rows], width, self.pad_id),
            attention=_attention(lengths, width),
            mask=(labels != -100).long(),
        )
        batch.columns |= {"step_labels": labels, "counted": counted}
        batch.notes = _notes(rows)
        return batch


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Prompts to be continued, as a model's `generate` takes them: `input_ids` `(P, L)` and `attention_mask`."""
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    return {
        "input_ids": _padded(prompts, width, pad_id, left=True),
        "attention_mask": _attention(lengths, width).flip(1),
    }


def _grouped(
    rows: Sequence[Row], answers: list[np.ndarray], counted: list[bool], group: int, pad_id: int, multiple: int | None
) -> GroupedBatch:
    """Left-padded prompts and right-padded answers, `group` of them a prompt."""
    prompts = [row["prompt_ids"] for row in rows]
    sizes, lengths = [len(p) for p in prompts], [len(a) for a in answers]
    wide, width = _width(sizes, multiple), _width(lengths, multiple)
    attention = _attention(lengths, width)
    mask = attention * torch.tensor(counted).repeat_interleave(group).unsqueeze(1)
    # Without a prompt, nothing predicts an answer's first token.
    mask[:, 0] *= torch.tensor([size > 0 for size in sizes]).repeat_interleave(group)
    return GroupedBatch(
        _padded(prompts, wide, pad_id, left=True),
        _attention(sizes, wide).flip(1),
        _padded(answers, width, pad_id),
        attention,
        mask,
        group_size=group,
        columns={"counted": torch.tensor(counted)},
        notes=_notes(rows),
    )


def _width(lengths: Sequence[int], multiple: int | None) -> int:
    longest = max(lengths)
    return -(-longest // multiple) * multiple if multiple else longest


def _padded(rows: Sequence[Any], width: int, fill: float, *, left: bool = False) -> Tensor:
    """Rows as one tensor `(B, width)`: int64, float32 or bool by what `fill` is."""
    dtype = {bool: np.bool_, int: np.int64, float: np.float32}[type(fill)]
    out = np.full((len(rows), width), fill, dtype)
    for at, row in enumerate(rows):
        if left:
            out[at, width - len(row) :] = row
        else:
            out[at, : len(row)] = row
    return torch.from_numpy(out)


def _attention(lengths: Sequence[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()


def _notes(rows: Sequence[Row]) -> dict[int, str]:
    return {int(row[ROW]): row[NOTE] for row in rows if row.get(NOTE)}
