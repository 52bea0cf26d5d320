"""Generated answers scored by a judge: before and after training, and which of the two is better."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.errors import UserError
from shared.runtime.checkpoint import write_atomically

Judge = Callable[[str, str], float]


def load_judge(path: str | None) -> Judge | None:
    """The function that a dotted path names, `package.module.function`; None for None.

    Raises:
        UserError: there is no such module or function.
    """
    if path is None:
        return None
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


def score(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The judge's scores of answers.

    Raises:
        UserError: the judge fails, or gives something that is no number; names the answer.
    """
    scores = []
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        try:
            scores.append(float(judge(prompt, answer)))
        except Exception as error:  # a user's function may raise anything
            name = getattr(judge, "__name__", str(judge))
            raise UserError(f"The judge {name} failed on answer {at} ({answer[:60]!r}): {error!r}") from error
    return scores


def win_rate(scores: Sequence[float], others: Sequence[float]) -> float:
    """The share of scores above their counterpart; ties count half."""
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(scores, others, strict=True)]
    return sum(wins) / len(wins)


def remember(scores: Sequence[float], folder: Path) -> None:
    """Keep the scores that the model had before training, for a run that is resumed too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "judged_before.json", json.dumps(list(scores)))


def recall(folder: Path) -> list[float] | None:
    """The scores that were kept; None where there are none."""
    path = folder / "judged_before.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
