"""The data sets of a run as a trainer takes them: their kind, their rows checked, and options that need rows."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from shared.data.rows import Rows, with_row_numbers
from shared.data.schema import Kind, check_rows, column_names, detect_kind, undecoded
from shared.errors import DataError, UserError
from shared.runtime.launch import on_first_process
from shared.trainers.config import AlignConfig


def usable_rows(rows: Any, what: str) -> Any:
    """A data set as the trainers read it: rows by their numbers, or a stream; None stays None.

    Args:
        rows: a datasets.Dataset or IterableDataset, a sequence of dicts, or a torch data set, which is read at once.
        what: the argument's name, for errors.

    Raises:
        UserError: it is something else, with what to make of it.
    """
    kind = type(rows).__name__
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        raise UserError(f"{what} is a {kind}: give datasets.Dataset.from_pandas({what}).")
    if rows is None or isinstance(rows, Rows) or (hasattr(rows, "map") and hasattr(rows, "features")):
        return rows
    if isinstance(rows, (str, bytes, os.PathLike)):
        raise UserError(f"{what} is a {kind}: give the rows themselves, as datasets.load_dataset gives them.")
    if isinstance(rows, Mapping) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UserError(
            f"{what} is a {kind}: give a datasets.Dataset or a list of dicts, and for a stream a "
            "datasets.IterableDataset (its from_generator takes a function that yields rows)."
        )
    if not hasattr(rows, "__iter__"):
        rows = [rows[at] for at in range(len(rows))]
    if len(rows) and not isinstance(rows[0], Mapping):
        raise UserError(f"{what}: its rows are to be dicts of columns, but the first is a {type(rows[0]).__name__}.")
    return rows


def kind_of(rows: Any, allowed: Collection[Kind], *, text_field: str = "text") -> Kind:
    """What the training rows are.

    Args:
        rows: the training rows, as the trainer is given them.
        allowed: the kinds to choose from.
        text_field: the column of plain text.

    Raises:
        UserError: no rows were given, a mapping of splits, or no data set; no column of the name asked for.
        DataError: the data set is empty, or its columns make none of the allowed kinds.
    """
    if rows is None:
        raise UserError("train_dataset is missing: give the rows to train on.")
    if isinstance(rows, dict):
        raise UserError(
            f"train_dataset holds the splits {', '.join(map(str, rows))}: give one, data['train'] for one."
        )
    first = next(iter(undecoded(usable_rows(rows, "train_dataset"))), None)
    if first is None:
        raise DataError("The data set is empty: it has no row to train on.")
    if text_field != "text" and text_field not in first:
        raise UserError(f"dataset_text_field {text_field}: the data set has no such column.")
    return detect_kind(column_names(rows), first, allowed=allowed, text_field=text_field)


def checked_rows(
    train: Any, held_out: Any, kind: Kind, args: AlignConfig, *, check_images: int = 0, text_field: str = "text"
) -> tuple[Any, dict[str, Rows] | Rows | None]:
    """The rows that can be used; what was found is printed.

    Args:
        train: rows, or a stream of which the first rows are checked.
        held_out: rows, several sets of them by name, or None; a stream is read into memory.
        kind: what the rows are.
        args: says what to do with a bad row.
        check_images: in how many leading rows of each set the images are decoded.
        text_field: the column of plain text.

    Raises:
        UserError: something that is no data set.
        DataError: rows that cannot be used, named.
    """
    options = {"check_images": check_images, "text_field": text_field}
    usable = _checked(usable_rows(train, "train_dataset"), kind, args, "train", **options)
    if isinstance(held_out, dict):
        return usable, {name: held_out_rows(rows, kind, args, name, **options) for name, rows in held_out.items()}
    return usable, None if held_out is None else held_out_rows(held_out, kind, args, "eval", **options)


def held_out_rows(rows: Any, kind: Kind, args: AlignConfig, what: str, **options: Any) -> Rows:
    """The rows of one held-out set that can be used; a stream is read into memory.

    Args:
        what: the set's name, for messages.
        As checked_rows otherwise.
    """
    rows = usable_rows(rows, "eval_dataset" if what == "eval" else f"eval_dataset {what!r}")
    if rows is None:
        raise UserError(f"eval_dataset {what!r} is None: give its rows, or leave the set out.")
    if not hasattr(rows, "__len__"):  # an evaluation goes over all its rows: a stream is read once, into memory
        rows = list(undecoded(rows))
    return _checked(rows, kind, args, what, **options)


def _checked(rows: Any, kind: Kind, args: AlignConfig, what: str, **options: Any) -> Any:
    report = on_first_process(lambda: check_rows(rows, kind, on_bad_row=args.on_bad_row, what=what, **options))
    if args.should_log:
        print(report.summary(what), flush=True)
    rows = undecoded(rows)
    return Rows(rows, report.kept, report.bad) if hasattr(rows, "__len__") else with_row_numbers(rows)


def check_evaluation(args: AlignConfig, held_out: Any) -> None:
    """Raise UserError where an evaluation is asked for and there are no rows for it."""
    if args.eval_strategy != "no" and held_out is None:
        raise UserError(
            f"eval_strategy is {args.eval_strategy.value}, but there are no held-out rows. Give eval_dataset (on "
            "the command line a data set with a test split, or --eval_fraction), or set eval_strategy to no."
        )


def check_steps(args: AlignConfig, train: Any) -> None:
    """Raise UserError where the rows make no step, or do not say how many they make."""
    if not hasattr(train, "__len__"):
        if args.max_steps <= 0:
            raise UserError("max_steps is missing: a stream does not say how many rows it has, so give the steps.")
        return
    step = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < step:
        raise UserError(
            f"dataloader_drop_last: {len(train)} rows do not fill a batch of {step}, so no step would be trained. "
            "Leave the option out, or make the batch smaller."
        )
