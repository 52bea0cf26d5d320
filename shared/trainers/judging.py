"""Generated answers scored by judges: before and after training, and which of the two is better."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.runtime.checkpoint import write_atomically

# `f(prompt, answer, …) -> number`: further arguments are columns of the row. It may have the attributes `figure`, the
# name of what it measures, and `lower_is_better`.
Judge = Callable[..., float]


def load_judges(given: Any) -> list[Judge]:
    """Functions, given as such or by their dotted paths `package.module.function`: one, several or None.

    Raises:
        UserError: there is no such module or function, or it is none; two functions measure what has the same name.
    """
    given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    judges = [_load(path) if isinstance(path, str) else path for path in given]
    for judge in judges:
        if not callable(judge):
            raise UserError(f"judge is a {type(judge).__name__}: give a function, or its dotted path.")
    figures = [figure_of(judge) for judge in judges]
    if len(set(figures)) < len(figures):
        raise UserError(
            f"judge: its functions measure {', '.join(figures)}. Give each a name of its own, as attribute `figure`."
        )
    return judges


def _load(path: str) -> Judge:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except ImportError as error:
        raise UserError(f"--judge {path}: {error}") from error
    except AttributeError:
        found = None
    if not callable(found):
        raise UserError(f"--judge {path}: no such function. Give its dotted path: package.module.function.")
    return found


def figure_of(judge: Judge) -> str:
    """The name of what a judge measures."""
    return getattr(judge, "figure", "judge_score")


def check_columns(judge: Judge, row: Mapping[str, Any]) -> None:
    """Raise UserError where a judge takes a column that a row does not have."""
    needed, _ = _columns(judge)
    if missing := [column for column in needed if column not in row]:
        raise UserError(
            f"The judge {_name(judge)} takes {', '.join(missing)}, which the held-out rows do not have. Give rows "
            "with it, another judge, or none (--judge none)."
        )


def score(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> list[float]:
    """The judge's scores of answers.

    Args:
        judge: the function.
        prompts, answers: as text.
        rows: what the answers belong to, for a judge that takes columns.

    Raises:
        UserError: the judge takes a column that there is not, fails, or gives something that is no number; names the
            answer.
    """
    needed, optional = _columns(judge)
    scores = []
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = rows[at] if rows is not None else {}
        check_columns(judge, row)
        columns = {column: row[column] for column in (*needed, *optional) if column in row}
        try:
            scores.append(float(judge(prompt, answer, **columns)))
        except Exception as error:  # a user's function may raise anything
            what = f"failed on answer {at} ({answer[:60]!r}): {error!r}"
            raise UserError(f"The judge {_name(judge)} {what}") from error
        if math.isnan(scores[-1]):
            raise UserError(f"The judge {_name(judge)} gave nan for answer {at} ({answer[:60]!r}): give a number.")
    return scores


def _name(judge: Judge) -> str:
    return getattr(judge, "__name__", str(judge))


def _columns(judge: Judge) -> tuple[list[str], list[str]]:
    """The columns that a judge takes beside prompt and answer: those that it needs, and those it can do without."""
    try:
        parameters = list(inspect.signature(judge).parameters.values())[2:]
    except ValueError:  # some that are written in C do not tell
        return [], []
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    needed = [each.name for each in named if each.default is each.empty]
    return needed, [each.name for each in named if each.name not in needed]


def win_rate(scores: Sequence[float], others: Sequence[float], *, lower_is_better: bool = False) -> float:
    """The share of scores that are better than their counterpart; ties count half."""
    sign = -1 if lower_is_better else 1
    wins = [(sign * a > sign * b) + 0.5 * (a == b) for a, b in zip(scores, others, strict=True)]
    return sum(wins) / len(wins)


def remember(scores: Sequence[float], folder: Path) -> None:
    """Keep the scores that the model had before training, for a run that is resumed too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "judged_before.json", json.dumps(list(scores)))


def recall(folder: Path) -> list[float] | None:
    """The scores that were kept; None where there are none."""
    path = folder / "judged_before.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
