"""Held-out questions answered by the model as it is: in shares over the processes, scored, and shown as samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

from accelerate.utils import gather_object
from torch import nn

from shared.data.rows import PADDING, Rows
from shared.runtime.generation import greedy_answers
from shared.runtime.report import SampleRow
from shared.trainers.config import AlignConfig

SAMPLES_SHOWN = 24

Made = TypeVar("Made")
# rows -> what `generate` takes for their prompts (left-padded), and the recorded answers
EncodePrompts = Callable[[Sequence[dict[str, Any]]], tuple[dict[str, Any], list[str]]]


@dataclass(frozen=True)
class Answer:
    """What the model says to a row's question, and what the row has for an answer."""

    row: dict[str, Any]
    text: str
    recorded: str


def first_set(rows: Any) -> Any:
    """The held-out rows, of the first set where there are several by name; None where there are none."""
    return next(iter(rows.values()), None) if isinstance(rows, dict) else rows


def evenly_spaced(rows: Any, count: int) -> Rows | None:
    """Some held-out rows to be answered, of the first set where there are several; None where there are none."""
    rows = first_set(rows)
    if not isinstance(rows, Rows) or count < 1:
        return None
    count = min(count, len(rows))
    return Rows(rows, kept=[at * len(rows) // count for at in range(count)])


def in_shares(
    rows: Rows, args: AlignConfig, work: Callable[[list[dict[str, Any]]], Sequence[Made | None]]
) -> list[tuple[int, Made]]:
    """What some work makes of each row, with the row's place, on every process; each process does its share.

    Args:
        rows: the rows.
        args: how many rows are worked on at once, and the processes.
        work: rows -> one thing each, None where there is none. All processes call it equally often.
    """
    share, size = rows.share(args.process_index, args.world_size), args.per_device_eval_batch_size
    found: list[tuple[int, Made]] = []
    for start in range(0, len(share), size):
        batch = [share[at] for at in range(start, min(start + size, len(share)))]
        for at, (row, made) in enumerate(zip(batch, work(batch), strict=True), start=start):
            if made is not None and not row.get(PADDING):
                found.append((at * args.world_size + args.process_index, made))
    if args.world_size > 1:
        found = gather_object(found)
    return sorted(found, key=itemgetter(0))


def answer(model: nn.Module, rows: Rows, encode: EncodePrompts, tokenizer: Any, args: AlignConfig) -> list[Answer]:
    """The model's greedy answers to all rows, on every process; each process answers its share."""

    def answered(batch: list[dict[str, Any]]) -> list[tuple[str, str]]:
        inputs, recorded = encode(batch)
        inputs = {name: value.to(args.device) for name, value in inputs.items()}
        texts = greedy_answers(model, inputs, tokenizer, max_new_tokens=args.max_new_tokens)
        return list(zip(texts, recorded, strict=True))

    return [Answer(rows[at], *given) for at, given in in_shares(rows, args, answered)]


def exact_matches(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of answers that are the recorded ones word for word: of all, and by the rows' column `kind`."""
    right: dict[str, list[bool]] = defaultdict(list)
    for each in answers:
        correct = each.text.strip() == each.recorded.strip()
        right["accuracy"].append(correct)
        if isinstance(each.row.get("kind"), str):
            right[f"accuracy/{each.row['kind']}"].append(correct)
    return {name: sum(of_kind) / len(of_kind) for name, of_kind in sorted(right.items())}


def sampled(answers: Sequence[Answer], show: Callable[[Answer], SampleRow]) -> list[SampleRow]:
    """Evenly spaced answers for the run report."""
    every = max(1, len(answers) // SAMPLES_SHOWN)
    return [show(each) for each in answers[::every][:SAMPLES_SHOWN]]
