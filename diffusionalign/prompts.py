"""Prompts to draw from: a list, a text file with one a line, a data set, or a function that gives one at each call.

What they become are rows with a column `prompt`, a text; other columns are for rewards. Prompts are not encoded here.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.data.files import LINES, load_local
from shared.data.rows import ROW, Rows, with_row_numbers
from shared.data.schema import STREAMED_ROWS_CHECKED, CheckReport, column_names, describe_bad, undecoded
from shared.errors import DataError, UserError
from shared.rewards.base import name_of
from shared.runtime.launch import on_first_process
from shared.trainers.datasets import check_evaluation, check_steps, usable_rows
from shared.trainers.keeping import preserved_randomness

# columns that are read as `prompt` where there is none of that name; the first of them that is there
OTHER_NAMES = ("caption", "text", "prompts", "captions", "description")


def checked_prompts(train: Any, held_out: Any, args: Any) -> tuple[Any, Rows | dict[str, Rows] | None]:
    """The prompts of a run as an online trainer takes them; what was found is printed.

    Args:
        train: a list of texts or of rows, a `.txt` file, a data set or stream, or a function; see `prompt_rows`.
        held_out: the same but for a function, several sets of them by name, or None.
        args: AlignConfig: what to do with a bad row, when to evaluate, the seed of a function's random numbers.

    Returns:
        Rows to draw from, or a stream of rows; and the held-out ones.

    Raises:
        UserError: something that holds no prompts, or an option that the rows do not allow.
        DataError: no prompt, or rows that cannot be used, named.
    """
    if train is None:
        raise UserError("train_dataset is missing: give the prompts to draw from.")
    check_evaluation(args, held_out)
    usable = _checked(train, "train_dataset", "train", args)
    if not hasattr(usable, "__len__"):
        check_steps(args, usable)
    if isinstance(held_out, Mapping):
        return usable, {name: _held_out(rows, f"eval_dataset {name!r}", name, args) for name, rows in held_out.items()}
    return usable, None if held_out is None else _held_out(held_out, "eval_dataset", "eval", args)


def prompt_rows(source: Any, what: str = "train_dataset", *, seed: int = 0) -> Any:
    """Rows with a column `prompt`; single prompts are not looked at.

    Args:
        source: a list of texts or of rows; a path that ends in `.txt`, one prompt a line; a data set or stream whose
            column of prompts is called `prompt` or one of OTHER_NAMES; or a function without arguments that gives a
            prompt, or a prompt and a dict of further columns, and is called as often as prompts are needed.
        what: the argument's name, for errors.
        seed: of Python's, numpy's and torch's random numbers while a function is called.

    Returns:
        Map-style rows, or a stream.

    Raises:
        UserError: something else. DataError: a data set without a column of prompts, or a broken file.
    """
    return _read(source, what, seed)[0]


def check_prompt(row: Mapping[str, Any]) -> None:
    """Raise DataError, naming the row, where its `prompt` is no text or an empty one."""
    if problem := _problem(row):
        raise DataError(f"row {row.get(ROW, 0)}: {problem}")


class DrawnPrompts:
    """The rows that a function gives, without end; each is asked for once, and kept.

    Every process calls the function for itself: with equal random numbers at its first call, so that functions that
    draw from Python's, numpy's or torch's give all processes the same prompts, and a resumed run those that it had.

    Args:
        function: gives a prompt, or a prompt and a dict of further columns.
        seed: of those random numbers; none of the training's are drawn.

    Raises:
        UserError: a function that needs arguments.
    """

    def __init__(self, function: Callable[[], Any], seed: int = 0):
        self.function, self.name = function, name_of(function)
        needed = _needed(function)
        if needed:
            raise UserError(f"The function {self.name} takes {needed[0]!r}: a function of prompts takes no arguments.")
        self._rows: list[dict[str, Any]] = []
        self._random = _seeded(seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for at in count():
            if at == len(self._rows):
                with preserved_randomness():
                    _set_random(self._random)
                    given = self.function()
                    self._random = _get_random()
                self._rows.append(self._row(given, at))
            yield self._rows[at]

    def _row(self, given: Any, at: int) -> dict[str, Any]:
        prompt, columns = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(columns, Mapping):
            raise DataError(
                f"row {at}: the function {self.name} gave {str(given)[:80]!r} ({type(given).__name__}); expected a "
                "text that is not empty, or such a text and a dict of further columns"
            )
        return {ROW: at, **columns, "prompt": prompt}


def _read(source: Any, what: str, seed: int) -> tuple[Any, str | None]:
    """The rows, and what was done to them in words."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.suffix.lower() != LINES or not path.is_file():
            raise UserError(
                f"{what} {str(source)!r}: there is no such text file. Give a list of prompts, a .txt file with one a "
                "line, a data set, or a function that gives prompts."
            )
        source = load_local(path)["train"]
    elif callable(source) and not hasattr(source, "__getitem__") and not hasattr(source, "__iter__"):
        return DrawnPrompts(source, seed), None
    elif isinstance(source, (list, tuple)):
        if not source:
            raise DataError(f"{what} is empty: it has no prompt.")
        source = [each if isinstance(each, Mapping) else {"prompt": each} for each in source]
    return _with_prompts(usable_rows(source, what), what)


def _with_prompts(rows: Any, what: str) -> tuple[Any, str | None]:
    names = column_names(rows if not isinstance(rows, Rows) else rows.dataset)
    if "prompt" in names:
        return rows, None
    other = next((name for name in OTHER_NAMES if name in names), None)
    if other is None:
        known = ", ".join(("prompt", *OTHER_NAMES))
        raise DataError(
            f"{what} has the columns {', '.join(names) or '(none)'}: none is known to hold prompts. Known are "
            f"{known}; name another one with dataset_columns, or rename it."
        )
    if hasattr(rows, "rename_column"):
        rows = rows.rename_column(other, "prompt")
    else:
        rows = [{("prompt" if name == other else name): value for name, value in row.items()} for row in rows]
    return rows, f"{other} → prompt"


def _held_out(source: Any, argument: str, what: str, args: Any) -> Rows:
    if source is None:
        raise UserError(f"{argument} is None: give its prompts, or leave the set out.")
    if callable(source) and not hasattr(source, "__len__") and not hasattr(source, "__iter__"):
        raise UserError(f"{argument} is a function, which has no end: give a list of prompts.")
    if hasattr(source, "map") and not hasattr(source, "__len__"):  # an evaluation goes over all its rows
        source = list(undecoded(source))
    return _checked(source, argument, what, args)


def _checked(source: Any, argument: str, what: str, args: Any) -> Any:
    rows, told = _read(source, argument, args.seed)
    streamed = not hasattr(rows, "__len__")
    report = on_first_process(lambda: _check(rows, what, args.on_bad_row))
    if args.should_log:
        if told:
            print(f"data: {what}: {told}", flush=True)
        print(report.summary(what), flush=True)
    if isinstance(rows, (Rows, DrawnPrompts)):
        return rows
    rows = undecoded(rows)
    return with_row_numbers(rows) if streamed else Rows(rows, report.kept, report.bad)


def _check(rows: Any, what: str, on_bad_row: str) -> CheckReport:
    """What is wrong with which rows; of a stream its first ones, and of a function the first one, are looked at."""
    streamed = not hasattr(rows, "__len__")
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns(["prompt"])
    if streamed:
        rows = list(islice(rows, 1 if isinstance(rows, DrawnPrompts) else STREAMED_ROWS_CHECKED))
    bad = {at: problem for at, row in enumerate(rows) if (problem := _problem(row))}
    if not len(rows):
        raise DataError(f"The {what} data is empty: it has no prompt.")
    if bad and (on_bad_row == "error" or len(bad) == len(rows)):
        raise DataError(describe_bad(bad, len(rows), what, skipping=on_bad_row == "skip"))
    kept = [at for at in range(len(rows)) if at not in bad] if bad and not streamed else None
    return CheckReport(rows=len(rows), kept=kept, bad=bad)


def _problem(row: Mapping[str, Any]) -> str | None:
    prompt = row.get("prompt")
    if prompt is None:
        return "prompt is missing"
    if not isinstance(prompt, str):
        return f"prompt is a {type(prompt).__name__}, expected a text"
    return None if prompt.strip() else "prompt is empty"


def _needed(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some that are written in C do not tell
        return []
    spread = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in spread]


def _seeded(seed: int) -> tuple[Any, ...]:
    return random.Random(seed).getstate(), np.random.RandomState(seed).get_state(), torch.Generator().manual_seed(seed)


def _get_random() -> tuple[Any, ...]:
    drawn = torch.Generator()
    drawn.set_state(torch.get_rng_state())
    return random.getstate(), np.random.get_state(), drawn


def _set_random(states: tuple[Any, ...]) -> None:
    python, numpy_state, drawn = states
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(drawn.get_state())
