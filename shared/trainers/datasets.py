"""The data sets of a run as a trainer takes them: their kind, their rows checked, and options that need rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from shared.data.rows import Rows, with_row_numbers
from shared.data.schema import Kind, check_rows, detect_kind, undecoded
from shared.errors import DataError, UserError
from shared.runtime.launch import on_first_process
from shared.trainers.config import AlignConfig


def kind_of(rows: Any, allowed: Collection[Kind]) -> Kind:
    """What the training rows are.

    Raises:
        UserError: no rows were given, or a mapping of splits.
        DataError: the data set is empty, or its columns make none of the allowed kinds.
    """
    if rows is None:
        raise UserError("train_dataset is missing: give the rows to train on.")
    if isinstance(rows, dict):
        raise UserError(
            f"train_dataset holds the splits {', '.join(map(str, rows))}: give one, data['train'] for one."
        )
    first = next(iter(undecoded(rows)), None)
    if first is None:
        raise DataError("The data set is empty: it has no row to train on.")
    return detect_kind(list(first), first, allowed=allowed)


def checked_rows(
    train: Any, held_out: Any, kind: Kind, args: AlignConfig, *, check_images: int = 0
) -> tuple[Any, dict[str, Rows] | Rows | None]:
    """The rows that can be used; what was found is printed.

    Args:
        train: rows, or a stream of which the first rows are checked.
        held_out: rows, several sets of them by name, or None; a stream is read into memory.
        kind: what the rows are.
        args: says what to do with a bad row.
        check_images: in how many leading rows of each set the images are decoded.

    Raises:
        DataError: rows that cannot be used, named.
    """

    def checked(rows: Any, what: str) -> Any:
        report = on_first_process(
            lambda: check_rows(rows, kind, on_bad_row=args.on_bad_row, check_images=check_images, what=what)
        )
        if args.should_log:
            print(report.summary(what), flush=True)
        rows = undecoded(rows)
        return Rows(rows, report.kept, report.bad) if hasattr(rows, "__len__") else with_row_numbers(rows)

    def checked_held_out(rows: Any, what: str) -> Rows:
        if not hasattr(rows, "__len__"):  # an evaluation goes over all its rows: a stream is read once, into memory
            rows = list(undecoded(rows))
        return checked(rows, what)

    usable = checked(train, "train")
    if isinstance(held_out, dict):
        return usable, {name: checked_held_out(rows, name) for name, rows in held_out.items()}
    return usable, None if held_out is None else checked_held_out(held_out, "eval")


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
