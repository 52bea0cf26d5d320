"""How the run report words its figures: numbers, shares, durations, sizes and the before/after comparison.

Shared by the terminal table and the HTML page, so that both say the same thing. It knows nothing of HTML or of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

MISSING = "-"
SHARE_WORDS = frozenset({"accuracy", "accuracies", "win"})
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "error"})
HIGHER_IS_BETTER = SHARE_WORDS | {"reward", "rewards", "pass"}
SPREAD_WORDS = frozenset({"std", "frac"})  # of a reward: neither way is better
SHARE_NAMES = re.compile(r"(?:^|[_/])(?:pass@(?:\d+|k)|exact_match(?:_reward)?|frac|clip(?:ped)?_ratio)(?=$|[_/])")
REWARD_PART = re.compile(r"^(?:eval_)?rewards/.+/(?:mean|std)$")  # in the reward's own unit, whatever it is called


def as_number(value: object) -> float | None:
    """`value` as a float if it is one number (Python, numpy or a zero-dimensional tensor), else None."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def words_of(metric: str) -> list[str]:
    """The words of a metric's name: `eval_accuracy/colour` gives eval, accuracy, colour."""
    return [word for word in re.split(r"[^0-9a-z]+", metric.lower()) if word]


def is_share(metric: str) -> bool:
    """Whether `metric` is a share in [0, 1] to be read as a percentage, judged by its name (`accuracy/colour`)."""
    if REWARD_PART.match(metric):
        return False
    return bool(SHARE_NAMES.search(metric)) or not SHARE_WORDS.isdisjoint(words_of(metric))


def is_duration(metric: str) -> bool:
    """Whether `metric` counts seconds, judged by its name (`time/generation`, `train_seconds`)."""
    words = words_of(metric.removeprefix("eval_"))
    return bool(words) and (words[0] == "time" or words[-1] in {"seconds", "runtime"})


def format_number(value: float | None) -> str:
    """About four significant digits: `1,234`, `0.5513`, `2e-05`; `-` where there is no value."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def format_metric(metric: str, value: float | None) -> str:
    """`value` the way `metric` is read: 0.16 is `16.0 %` for an accuracy, `0.16 s` for a time, `0.16` otherwise."""
    if value is None or not math.isfinite(value):
        return format_number(value)
    if is_share(metric):
        return f"{100 * value:.2g} %" if 0 < abs(value) < 0.001 else f"{100 * value:.1f} %"
    return format_duration(value) if is_duration(metric) else format_number(value)


def format_duration(seconds: float) -> str:
    """`4.21 s`, `1 min 52 s`, `3 h 07 min`."""
    if not math.isfinite(seconds) or abs(seconds) < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def format_bytes(size: float) -> str:
    """`812 MiB`, `1.25 GiB` (binary units: 1 GiB = 1024 MiB)."""
    mebibytes = size / 2**20
    if not math.isfinite(mebibytes) or abs(mebibytes) < 1024:
        return f"{mebibytes:.0f} MiB" if abs(mebibytes) >= 10 else f"{mebibytes:.1f} MiB"
    return f"{mebibytes / 1024:.2f} GiB"


def format_throughput(name: str, value: float) -> str:
    """A duration for a name that says so and is no rate (`train_seconds`), a number for the others."""
    return format_duration(value) if is_duration(name) else format_number(value)


def readable(name: str) -> str:
    """A metric's or option's name as running text: `samples_per_second` gives `samples per second`."""
    return name.replace("_", " ")


def answers_match(given: str, reference: str) -> bool:
    """Exact match, blanks around the answer and letter case aside."""
    return given.strip().casefold() == reference.strip().casefold()


@dataclass(frozen=True)
class Comparison:
    """One row of the before/after table, worded. `better` is None where the name does not say which way is good."""

    what: str
    before: str
    after: str
    change: str
    better: bool | None


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[Comparison]:
    """One row a metric: those of `before` in their order, then those that only `after` has."""
    return [_compare_one(what, before.get(what), after.get(what)) for what in dict.fromkeys([*before, *after])]


def _compare_one(what: str, before: float | None, after: float | None) -> Comparison:
    change, better = MISSING, None
    if before is not None and after is not None and math.isfinite(after - before):
        difference = after - before
        if is_share(what):
            difference = round(100 * difference, 1)
            change = f"{difference:+.1f} points" if difference else "0.0 points"
        else:
            change = ("+" if difference > 0 else "") + format_number(difference)
        words = set(words_of(what))
        if words & SPREAD_WORDS:
            better = None
        elif difference and words & HIGHER_IS_BETTER:
            better = difference > 0
        elif difference and words & LOWER_IS_BETTER:
            better = difference < 0
    return Comparison(what, format_metric(what, before), format_metric(what, after), change, better)


def before_after_table(
    before: Mapping[str, float], after: Mapping[str, float], *, title: str = "Before and after training"
) -> str:
    """The comparison as plain ASCII text for a terminal: what, before, after, change.

    Args:
        before, after: metric -> value. A name with the word `accuracy` holds a share in [0, 1], shown as a percentage;
            its change is in percentage points. A metric that one of the two lacks shows `-` there.
        title: the line above the table.

    Returns:
        The table without a newline at its end; the title and one explaining line where there is nothing to compare.

    Example:
        >>> print(before_after_table({"accuracy/colour": 0.16}, {"accuracy/colour": 1.0}))
        Before and after training
        what             before    after        change
        ---------------  ------  -------  ------------
        accuracy/colour  16.0 %  100.0 %  +84.0 points
    """
    rows = [(row.what, row.before, row.after, row.change) for row in compare(before, after)]
    if not rows:
        return f"{title}\n(nothing was measured)"
    header = ("what", "before", "after", "change")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest])

    return "\n".join([title, line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
