"""Pairs of pictures for one prompt, of which one is preferred: the rows of a data set as Diffusion-DPO reads them.

Columns are `prompt`, `chosen` and `rejected`, or those of Pick-a-Pic: `caption`, `jpg_0`, `jpg_1` and `label_0`, how
far the first picture is preferred (1, 0, or ½ for a tie, of which nothing is learnt). Nothing is resized or encoded
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from shared.data.images import decode_image, image_problem, undecoded
from shared.data.rows import ROW, Rows, with_row_numbers
from shared.data.schema import STREAMED_ROWS_CHECKED, CheckReport, column_names, describe_bad
from shared.errors import DataError, UserError
from shared.runtime.launch import on_first_process
from shared.trainers.datasets import check_evaluation, check_steps, usable_rows

PICTURES = ("chosen", "rejected")
OWN = ("prompt", *PICTURES)
PICK_A_PIC = ("caption", "jpg_0", "jpg_1", "label_0")
TIE = "a tie: neither picture is preferred"
PORTION = 64  # rows whose pictures are decoded at a time


class PairRows(Rows):
    """Rows with `prompt`, `chosen` and `rejected`, whatever their columns are called; arguments as Rows."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return paired(super().__getitem__(index))

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [paired(row) for row in super().__getitems__(indices)]


def paired(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Pick-a-Pic's columns with the columns of the suite; any other one as it is."""
    if "chosen" in row or "jpg_0" not in row:
        return row
    rest = {name: value for name, value in row.items() if name not in PICK_A_PIC}
    first, second = ("jpg_0", "jpg_1") if (label(row) or 0) >= 0.5 else ("jpg_1", "jpg_0")
    return {**rest, "prompt": row["caption"], "chosen": row[first], "rejected": row[second]}


def is_tie(row: Mapping[str, Any]) -> bool:
    """Whether neither of a row's pictures is preferred."""
    return "chosen" not in row and label(row) == 0.5


def label(row: Mapping[str, Any]) -> float | None:
    """Pick-a-Pic's `label_0` as a number, which a CSV file has as text; None where it is none."""
    try:
        return float(row["label_0"])
    except (KeyError, TypeError, ValueError):
        return None


def checked_pairs(train: Any, held_out: Any, args: Any) -> tuple[Any, PairRows | dict[str, PairRows] | None]:
    """The pairs of a run; what was found is printed.

    Args:
        train: rows, or a stream of which the first rows are checked.
        held_out: rows, several sets of them by name, or None; a stream is read into memory.
        args: AlignConfig: what to do with a bad row, in how many rows pictures are decoded, when to evaluate.

    Raises:
        UserError: no data set, or an option that the rows do not allow.
        DataError: columns or rows that cannot be used, named.
    """
    if train is None:
        raise UserError("train_dataset is missing: give the pairs to train on.")
    if isinstance(train, Mapping):
        raise UserError(f"train_dataset holds the splits {', '.join(map(str, train))}: give one of them.")
    check_evaluation(args, held_out)
    usable = _checked(usable_rows(train, "train_dataset"), "train", args)
    check_steps(args, usable)
    if isinstance(held_out, Mapping):
        return usable, {name: _held_out(rows, name, args) for name, rows in held_out.items()}
    return usable, None if held_out is None else _held_out(held_out, "eval", args)


def _held_out(rows: Any, name: str, args: Any) -> PairRows:
    rows = usable_rows(rows, "eval_dataset" if name == "eval" else f"eval_dataset {name!r}")
    if rows is None:
        raise UserError(f"eval_dataset {name!r} is None: give its rows, or leave the set out.")
    return _checked(rows if hasattr(rows, "__len__") else list(undecoded(rows)), name, args)


def _checked(rows: Any, what: str, args: Any) -> Any:
    if isinstance(rows, PairRows):
        return rows
    rows = undecoded(rows)
    report, kept = on_first_process(lambda: _report(rows, what, args))
    if args.should_log:
        print(report.summary(what), flush=True)
    return PairRows(rows, kept, report.bad) if hasattr(rows, "__len__") else with_row_numbers(rows)


def _report(rows: Any, what: str, args: Any) -> tuple[CheckReport, list[int] | None]:
    """What was found, and the rows to use; None: all."""
    streamed = not hasattr(rows, "__len__")
    first = list(islice(rows, STREAMED_ROWS_CHECKED)) if streamed else rows
    if not len(first):
        raise DataError(f"The {what} data is empty: it has no rows.")
    columns = column_names(rows)
    needed = next((each for each in (OWN, PICK_A_PIC) if set(each) <= set(columns)), None)
    if needed is None:
        raise DataError(
            f"The {what} data has the columns {', '.join(columns)}. Pairs have prompt, chosen and rejected (the two "
            f"pictures), or {', '.join(PICK_A_PIC)}. dataset_columns renames columns."
        )
    # all rows by their texts alone: reading the pictures of a hundred thousand takes as long as training on them
    texts = [name for name in needed if name in ("prompt", "caption", "label_0")]
    light = first.select_columns(texts) if hasattr(first, "select_columns") else first
    bad, ties, count = {}, [], 0
    for count, row in enumerate(light, start=1):
        if problem := _text_problem(row, needed):
            bad[count - 1] = problem
        elif needed is PICK_A_PIC and is_tie(row):
            ties.append(count - 1)
    left_out = {*bad, *ties}
    decoded = count if args.check_rows is None else min(args.check_rows, count)
    sizes = _decode(first, [at for at in range(decoded) if at not in left_out], bad)
    if bad and args.on_bad_row == "error":
        raise DataError(describe_bad(bad, count, what, skipping=False))
    kept = [at for at in range(count) if at not in bad and at not in set(ties)]
    if not kept:
        raise DataError(describe_bad(bad | dict.fromkeys(ties, TIE), count, what, skipping=True))
    report = CheckReport(
        rows=count - len(ties),
        bad=dict(sorted(bad.items())),
        images=len(sizes),
        smallest=min(sizes, key=lambda size: size[0] * size[1], default=None),
        largest=max(sizes, key=lambda size: size[0] * size[1], default=None),
        warnings=[f"{len(ties):,} more are ties and left out: neither picture is preferred"] if ties else [],
    )
    return report, kept if len(kept) < count else None


def _text_problem(row: Mapping[str, Any], needed: tuple[str, ...]) -> str | None:
    prompt = row.get(needed[0])
    if not isinstance(prompt, str) or not prompt.strip():
        return f"{needed[0]} is {type(prompt).__name__ if not isinstance(prompt, str) else 'empty'}, expected a text"
    if needed is PICK_A_PIC and label(row) not in (0, 0.5, 1):
        return f"label_0 is {row['label_0']!r}, expected 1 (jpg_0 is preferred), 0 or 0.5 (a tie)"
    return None


def _decode(rows: Any, places: list[int], bad: dict[int, str]) -> list[tuple[int, int]]:
    """Sizes of the pictures of some rows; what cannot be read is added to `bad`."""

    def sizes(at: int) -> list[tuple[int, int]]:
        try:
            return [picture.size for picture in pictures(paired({ROW: at, **rows[at]}))]
        except DataError as error:
            bad[at] = str(error).split(": ", 1)[1]
            return []

    with ThreadPoolExecutor() as pool:
        portions = (places[start : start + PORTION] for start in range(0, len(places), PORTION))
        return [size for portion in portions for found in pool.map(sizes, portion) for size in found]


def pictures(row: Mapping[str, Any]) -> list[Any]:
    """The chosen and the rejected picture of a row, as RGB PIL images.

    Raises:
        DataError: one is missing or cannot be read, named.
    """
    number = row.get(ROW, 0)
    for name in PICTURES:
        raw = row.get(name)
        if raw is None:
            raise DataError(f"row {number}: {name} is missing, expected a picture")
        if problem := image_problem(raw):
            raise DataError(f"row {number}: {name}: {problem}")
    return [decode_image(row[name], row=number) for name in PICTURES]
