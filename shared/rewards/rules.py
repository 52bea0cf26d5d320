r"""Rewards by rule, under the names and with the signatures that the field uses.

Completions are strings, or lists of messages. What is right in mathematics is decided by math-verify; it is only
loaded where numbers do not decide. Deliberately not here: rewards that need a model (models.py, classifiers.py).
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from shared.errors import UserError
from shared.rewards.base import text_of

NUMBER = re.compile(r"-?\d{1,100}(\.\d{1,100})?", re.ASCII)  # Python refuses to read very long ones
INTEGER = re.compile(r"-?\d{1,100}", re.ASCII)
BOXED = re.compile(r"([^\\$\[]*)\\boxed\{(-?\d{1,100})\}([^\\$\[]*)", re.ASCII)  # the only mathematics of a completion
PERCENT = re.compile(r"\s*(%|percent|pct)", re.IGNORECASE)
MATHEMATICS = re.compile(r"[\\$\[]")  # without one of these a completion has no LaTeX
THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
PARSING_SECONDS, VERIFYING_SECONDS = 10, 5

Log = Callable[[str, Sequence[Any]], None]


def accuracy_reward(
    completions: Sequence[Any], solution: Sequence[str], log_extra: Log | None = None, **columns: Any
) -> list[float | None]:
    r"""1 where a completion gives the solution, 0 where it does not, None where the solution cannot be read.

    The answer is the first `\boxed{...}` or other anchored LaTeX of a completion, and is compared as mathematics:
    `\boxed{\frac{1}{2}}` answers `0.5`. A completion that is nothing but the solution, or but a number equal to it,
    is right too; other numbers outside LaTeX are not looked at.

    Args:
        completions: B strings or lists of messages.
        solution: the data's column: B texts, numbers or LaTeX.
        log_extra: is given the column `solution`.
    """
    if log_extra is not None:
        log_extra("solution", list(solution))
    pairs = zip(completions, solution, strict=True)
    return [_accuracy(text_of(completion), str(expected)) for completion, expected in pairs]


def exact_match_reward(completions: Sequence[Any], solution: Sequence[Any], **columns: Any) -> list[float]:
    """1 where a completion is the solution word for word, but for space around it; 0 where not.

    For answers that are no mathematics, of which `accuracy_reward` could not say that they are wrong.

    Args:
        completions: B strings or lists of messages.
        solution: the data's column: B texts.
    """
    pairs = zip(completions, solution, strict=True)
    return [float(text_of(completion).strip() == str(expected).strip()) for completion, expected in pairs]


def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: Log | None = None,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        completions: B strings or lists of messages.
        solution: the data's column.
        reasoning_delimiters: what ends the reasoning; the answer follows the last of them. None: `</think>`.
        log_extra: is given the column `solution`.
    """
    if log_extra is not None:
        log_extra("solution", list(solution))
    delimiters = ["</think>"] if reasoning_delimiters is None else list(reasoning_delimiters)
    if not delimiters or not all(delimiters):
        raise UserError("reasoning_delimiters must be texts that are not empty, at least one.")
    rewards: list[float | None] = []
    for completion, expected in zip(completions, solution, strict=True):
        text = text_of(completion)
        ends = [text.rfind(each) + len(each) for each in delimiters if each in text]
        rewards.append(_accuracy(text[max(ends) :], str(expected)) if ends else 0.0)
    return rewards


def think_format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where a completion is `<think>`, reasoning, `</think>`, answer, with one `<think>` alone; else 0."""
    return [1.0 if THINK.match(text_of(completion)) else 0.0 for completion in completions]


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Accuracy scaled by length: right answers are worth more when short, wrong ones cost more when short.

    `lo + (hi − lo)(1 + cos(π·min(|y|/max_len, 1)))/2`, from `hi` at length 0 to `lo` at `max_len` and beyond, with
    (lo, hi) the two values of right answers, and (max_value_wrong, min_value_wrong) of wrong ones. None where the
    solution cannot be read. Paper: https://arxiv.org/abs/2502.03373, appendix C.1.

    Args:
        max_len: tokens.
        min_value_wrong, max_value_wrong: of a wrong answer at length 0, and at `max_len`.
        min_value_correct, max_value_correct: of a right answer at `max_len`, and at length 0.

    Raises:
        UserError: `max_len` is less than 1.
    """
    _at_least("max_len", max_len, 1)

    def cosine_scaled_reward(
        completions: Sequence[Any], solution: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            low, high = (min_value_correct, max_value_correct) if right else (max_value_wrong, min_value_wrong)
            share = (1 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
            rewards.append(None if right is None else low + (high - low) * share)
        return rewards

    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """`max_penalty` times the share of a completion's n-grams that repeat an earlier one; 0 where it has no n-gram.

    Paper: https://arxiv.org/abs/2502.03373, appendix C.2.

    Args:
        ngram_size: tokens.
        max_penalty: at most 0.

    Raises:
        UserError: a value that cannot be.
    """
    _at_least("ngram_size", ngram_size, 1)
    if max_penalty > 0:
        raise UserError(f"max_penalty is {max_penalty}: a penalty is 0 or less.")

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        rewards = []
        for ids in completion_ids:
            grams = [tuple(ids[at : at + ngram_size]) for at in range(len(ids) - ngram_size + 1)]
            repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
            rewards.append(repeated * max_penalty if repeated else 0.0)
        return rewards

    return repetition_penalty_reward


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """0 up to `max_completion_len - soft_punish_cache` tokens, from there on falling to −1 at `max_completion_len`.

    Paper: DAPO, https://arxiv.org/abs/2503.14476, equation 13.

    Args:
        max_completion_len: tokens.
        soft_punish_cache: tokens over which the punishment grows; 0: none up to the greatest length.

    Raises:
        UserError: a value that cannot be.
    """
    _at_least("max_completion_len", max_completion_len, 1)
    _at_least("soft_punish_cache", soft_punish_cache, 0)
    free = max_completion_len - soft_punish_cache

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        lengths = [len(ids) for ids in completion_ids]
        return [
            0.0 if n <= free else -1.0 if n > max_completion_len else (free - n) / soft_punish_cache for n in lengths
        ]

    return soft_overlong_punishment_reward


def _accuracy(text: str, solution: str) -> float | None:
    answer, solution = text.strip(), solution.strip()
    if (quick := _by_numbers(answer, solution)) is not None:
        return quick
    gold = _parsed(solution, None)
    if not gold:
        return None
    if answer == solution:
        return 1.0
    from math_verify import verify

    return float(verify(list(gold), list(_parsed(answer, _extraction())), timeout_seconds=_limit(VERIFYING_SECONDS)))


def _by_numbers(answer: str, solution: str) -> float | None:
    """What can be decided by numbers, as math-verify decides it; None where it cannot."""
    if not NUMBER.fullmatch(solution):
        return None
    if NUMBER.fullmatch(answer):
        return float(Fraction(answer) == Fraction(solution))
    if not MATHEMATICS.search(answer):
        return 0.0
    boxed = BOXED.fullmatch(answer)
    if boxed is None or PERCENT.match(boxed[3]) or not INTEGER.fullmatch(solution):
        return None
    return float(int(boxed[2]) == int(solution))


@functools.lru_cache(maxsize=4096)  # the completions of a group have one solution
def _parsed(text: str, extraction: Any) -> tuple[Any, ...]:
    from math_verify import parse

    for name in ("parser", "grader"):  # they warn of every thread where there is no limit
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    options = {} if extraction is None else {"extraction_config": [extraction], "extraction_mode": "first_match"}
    return tuple(parse(text, parsing_timeout=_limit(PARSING_SECONDS), **options))


@functools.cache
def _extraction() -> Any:
    """Answers are read as LaTeX, what is boxed first, and only where something marks them as mathematics."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    return LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )


def _limit(seconds: int) -> int | None:
    """math-verify limits its time by a signal, which the main thread alone can take."""
    return seconds if threading.current_thread() is threading.main_thread() else None


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}: it must be at least {least}.")
