"""Held-out questions answered by the model as it is: in shares over the processes, scored, and shown as samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from shared.data.rows import Rows
from shared.runtime.generation import greedy_answers
from shared.runtime.report import SampleRow
from shared.trainers.config import AlignConfig

SAMPLES_SHOWN = 24

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


def answer(model: nn.Module, rows: Rows, encode: EncodePrompts, tokenizer: Any, args: AlignConfig) -> list[Answer]:
    """The model's greedy answers to all rows, on every process; each process answers its share."""
    share = rows.share(args.process_index, args.world_size)
    size = args.per_device_eval_batch_size
    answered: list[tuple[int, str, str]] = []
    for start in range(0, len(share), size):
        batch = [share[at] for at in range(start, min(start + size, len(share)))]
        inputs, recorded = encode(batch)
        inputs = {name: value.to(args.device) for name, value in inputs.items()}
        texts = greedy_answers(model, inputs, tokenizer, max_new_tokens=args.max_new_tokens)
        at = [(start + i) * args.world_size + args.process_index for i in range(len(batch))]
        answered += list(zip(at, texts, recorded, strict=True))
    if args.world_size > 1:
        answered = gather_object(answered)
    by_row = {at: (text, recorded) for at, text, recorded in answered}
    return [Answer(rows[at], *by_row[at]) for at in range(len(rows))]


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
