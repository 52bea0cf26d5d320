"""The tokens of one row, made what its kind of row is: split into prompt and answers, and cut to the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shared.data.chat import Span
from shared.data.cutting import Limits
from shared.data.schema import Kind
from shared.data.text_checks import listed
from shared.errors import DataError

Tokens = tuple[list[int], list[Span]]  # of one text, and the ranges `[first, last)` of those that count
Record = dict[str, Any]  # columns of one row: lists of tokens, bytes of zeros and ones, single values


def whole_row(own: Tokens, number: int, limits: Limits) -> tuple[Record, dict[str, int]]:
    """`input_ids` and `learnt` of a supervised row, and its tokens before cutting.

    Raises:
        DataError: nothing is learnt of what is left.
    """
    ids, ranges = own
    learnt = bytearray(len(ids))
    for first, last in ranges:
        learnt[first:last] = b"\x01" * (last - first)
    keep = limits.kept(len(ids))
    kept = learnt[keep]
    kept[:1] = bytes(len(kept[:1]))  # a row's first token has no predecessor that could predict it
    if 1 not in kept:
        if len(kept) == len(ids):
            raise DataError(f"row {number}: none of its {len(ids)} tokens is learnt")
        raise DataError(
            f"row {number}: of its {len(ids)} tokens {len(kept)} are left after cutting, and none of them is learnt; "
            f"{_said(limits)}"
        )
    return {"input_ids": ids[keep], "learnt": kept}, {"row": len(ids)}


def prompt_row(own: Tokens, number: int, limits: Limits) -> tuple[Record, dict[str, int]]:
    """`input_ids` of a prompt without an answer, and `learnt`, none of them; its tokens before cutting.

    Raises:
        DataError: it is empty.
    """
    ids, _ = own
    if not ids:
        raise DataError(f"row {number}: prompt is empty, so there is nothing to go on from")
    keep, _ = limits.kept_parts(len(ids), [0])
    return {"input_ids": ids[keep], "learnt": bytes(len(ids[keep]))}, {"prompt": len(ids)}


def answers_row(
    own: list[Tokens], row: Mapping[str, Any], kind: Kind, number: int, limits: Limits
) -> tuple[Record, dict[str, int]]:
    """`prompt_ids` with one answer or two, and the tokens of each part before cutting.

    Two answers share their prompt exactly: tokens from the first on in which they differ belong to the answers.

    Raises:
        DataError: nothing is left of an answer, or nothing in which two answers differ.
    """
    prompt, shared = own[0][0], min(ranges[0][0] for _, ranges in own)
    if any(ids[:shared] != prompt[:shared] for ids, _ in own):
        shared = next(at for at in range(shared) if any(ids[at] != prompt[at] for ids, _ in own))
    answers = [ids[shared : ranges[0][1]] for ids, ranges in own]
    kept_prompt, kept = limits.kept_parts(shared, [len(answer) for answer in answers])
    cut = [answer[keep] for answer, keep in zip(answers, kept, strict=True)]
    if not all(cut):
        raise DataError(
            f"row {number}: no token of an answer is left after cutting: its prompt has {shared} tokens, the longest "
            f"answer {max(map(len, answers))}; {_said(limits)}"
        )
    record: Record = {"prompt_ids": prompt[:shared][kept_prompt]}
    if kind is Kind.UNPAIRED:
        record |= {"completion_ids": cut[0], "label": bool(row["label"])}
        return record, {"prompt": shared, "completion": len(answers[0])}
    if cut[0] == cut[1]:
        same = f" after cutting; {_said(limits)}" if answers[0] != answers[1] else ""
        raise DataError(f"row {number}: the tokens of chosen and rejected are the same{same}")
    margin = row.get("margin")
    record |= {"chosen_ids": cut[0], "rejected_ids": cut[1], "margin": float("nan") if margin is None else margin}
    return record, {"prompt": shared, "chosen": len(answers[0]), "rejected": len(answers[1])}


def steps_row(
    own: Tokens, row: Mapping[str, Any], number: int, limits: Limits, *, last_only: bool
) -> tuple[Record, dict[str, int]]:
    """`input_ids` of a stepwise row with `step_ends` and `step_labels`, and its tokens before cutting.

    Raises:
        DataError: no step's end is left.
    """
    ids, ranges = own
    start, ends = ranges[0][0], [last - 1 for _, last in ranges]
    labels = [bool(label) for label in row["labels"]]
    if last_only:
        ends, labels = ends[-1:], labels[-1:]
    kept_prompt, (kept,) = limits.kept_parts(start, [len(ids) - start])
    first, stop = kept_prompt.start, start + kept.stop
    found = [(end - first, label) for end, label in zip(ends, labels, strict=True) if end < stop]
    if not found:
        raise DataError(f"row {number}: no step's end is left after cutting; {_said(limits)}")
    record = {
        "input_ids": ids[first:stop],
        "step_ends": [end for end, _ in found],
        "step_labels": bytes(label for _, label in found),
    }
    return record, {"row": len(ids)}


def given_tokens(row: Mapping[str, Any], loss_on: str) -> Tokens:
    """The tokens of a row that is tokenised already, and the ranges of those that are learnt."""
    ids = list(listed(row["input_ids"]))
    name = {"completion": "completion_mask", "assistant": "assistant_masks"}.get(loss_on)
    if row.get("labels") is not None:
        counted = [label != -100 for label in listed(row["labels"])]
    else:
        counted = [bool(value) for value in listed(row[name])] if name else [True] * len(ids)
        if loss_on == "assistant" and row.get("completion_mask") is not None:  # of the completion's turns alone
            counted = [a and bool(b) for a, b in zip(counted, listed(row["completion_mask"]), strict=True)]
    before, after = [False, *counted], [*counted, False]
    edges = [at for at, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
    return ids, list(zip(edges[::2], edges[1::2], strict=True))


def _said(limits: Limits) -> str:
    given = {name: value for name, value in asdict(limits).items() if value is not None}
    return "the limits are " + ", ".join(f"{name}={value}" for name, value in given.items())
