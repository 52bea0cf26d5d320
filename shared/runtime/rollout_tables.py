"""Sample tables of an online run: which are kept, how report.json holds them, how a terminal shows them.

A table is what was sampled and how it was rewarded at one step. Nothing is computed here; the page shows the tables by
`report_rollouts`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shared.runtime.report_pictures import Picture
from shared.runtime.report_text import MISSING, format_number

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TABLES = 20
NEWEST = 10  # of those, kept without gaps
LEAST_COMPLETION = 24  # columns of the terminal; parts of a reward give way to it
WIDEST_PART = 12
WIDEST_FIGURE = 9


@dataclass
class RolloutRow:
    """One completion and its rewards.

    Attributes:
        images: the prompt's PIL images, or what is left of them in a kept table.
        prompt, completion: as text, special tokens included where they matter.
        rewards: part -> value; None or NaN where it does not apply.
        reward: the weighted sum of the parts; None where none applies.
        advantage: as the loss uses it.
        tokens: the completion's length, the ending token included.
        finished: whether it ended by itself; False: cut at the longest length allowed.
        group: which prompt of the table it belongs to. None: told apart by prompt and images.
        extra: column -> what a reward noted of the row, as text.
    """

    images: list[Image | Picture]
    prompt: str
    completion: str
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float
    tokens: int
    finished: bool
    group: int | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass
class RolloutTable:
    """What was sampled for `step`, the first that learns from it."""

    step: int
    rows: list[RolloutRow] = field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """The names of the rewards of all rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row.rewards))

    @property
    def extras(self) -> list[str]:
        """The names of the further columns of all rows."""
        return list(dict.fromkeys(name for row in self.rows for name in row.extra))

    @property
    def mean_reward(self) -> float | None:
        """Over the rows that have one."""
        known = [row.reward for row in self.rows if is_known(row.reward)]
        return math.fsum(known) / len(known) if known else None

    def groups(self) -> list[list[RolloutRow]]:
        """The rows of each prompt, in the order in which the prompts appear."""
        found: list[list[RolloutRow]] = []
        for row in self.rows:
            same = next((group for group in found if _same_prompt(group[0], row)), None)
            if same is None:
                found.append([row])
            else:
                same.append(row)
        return found

    def with_thumbnails(self) -> RolloutTable:
        """The same table with small pictures, prompt by prompt, so that a kept one holds no photographs."""
        rows = []
        for group in self.groups():
            pictures = [Picture.of(image) for image in group[0].images]  # the same for all of them: made once
            rows += [replace(row, images=pictures) for row in group]
        return RolloutTable(self.step, rows)


def is_known(reward: float | None) -> bool:
    """Whether the reward applies to its row."""
    return reward is not None and math.isfinite(reward)


def _same_prompt(one: RolloutRow, other: RolloutRow) -> bool:
    if one.group is not None or other.group is not None:
        return one.group == other.group
    if one.prompt != other.prompt or len(one.images) != len(other.images):
        return False
    return all(a is b or a == b for a, b in zip(one.images, other.images, strict=True))


def add_table(tables: Sequence[RolloutTable], table: RolloutTable) -> list[RolloutTable]:
    """`tables` (ascending steps) and `table`, thinned to MOST_TABLES.

    A table of the same or a later step is dropped: a run that went back to a checkpoint samples it again. The first
    table and the newest NEWEST stay; of those between, one that has the closest neighbours goes, so that the rest
    remain evenly spread over the run.
    """
    kept = [one for one in tables if one.step < table.step] + [table]
    while len(kept) > MOST_TABLES:
        between = range(1, len(kept) - NEWEST)
        del kept[min(between, key=lambda place: kept[place + 1].step - kept[place - 1].step)]
    return kept


def to_json(tables: Iterable[RolloutTable]) -> list[dict[str, Any]]:
    """Tables as plain data: each prompt once, with the number of its images in their place."""
    return [
        {
            "step": table.step,
            "prompts": [
                {
                    "prompt": rows[0].prompt,
                    "images": len(rows[0].images),
                    "completions": [
                        {
                            "completion": row.completion,
                            "rewards": dict(row.rewards),
                            "reward": row.reward,
                            "advantage": row.advantage,
                            "tokens": row.tokens,
                            "finished": row.finished,
                            **({"extra": dict(row.extra)} if row.extra else {}),
                        }
                        for row in rows
                    ],
                }
                for rows in table.groups()
            ],
        }
        for table in tables
    ]


def from_json(tables: Iterable[Mapping[str, Any]], *, up_to: int | None = None) -> list[RolloutTable]:
    """Tables as `to_json` gave them, without their pictures.

    Args:
        tables: the plain data.
        up_to: the step from which a run goes on; what was sampled after it is left out. None: all.
    """
    return [
        RolloutTable(
            table["step"],
            [
                RolloutRow(
                    [],
                    prompt["prompt"],
                    row["completion"],
                    dict(row["rewards"]),
                    row["reward"],
                    math.nan if row["advantage"] is None else row["advantage"],
                    row["tokens"],
                    row["finished"],
                    group=place,
                    extra=dict(row.get("extra", {})),
                )
                for place, prompt in enumerate(table["prompts"])
                for row in prompt["completions"]
            ],
        )
        for table in tables
        if up_to is None or table["step"] <= up_to
    ]


def signed(value: float) -> str:
    """A number with its sign: `+0.87`, `-1.2`, `0`."""
    return ("+" if value > 0 else "") + format_number(value)


def rollout_text(table: RolloutTable, width: int = 100) -> str:
    """The table for a terminal: each prompt on one line, its completions below it, one line each.

    Args:
        table: what was sampled at one step.
        width: columns of the terminal. Texts are cut in their middle to fit; parts of the reward that do not fit are
            left out; what a reward noted of a completion stands on a line of its own. Below about 70 columns the
            lines may be longer.

    Returns:
        Lines without a newline at the end. Control characters are shown as escapes, so that a completion cannot
        steer the terminal.
    """
    mean = table.mean_reward
    title = f"Rollouts at step {table.step:,}" + (
        "" if mean is None else f" (mean reward of those shown {format_number(mean)})"
    )
    figures = [len("advantage"), WIDEST_FIGURE, len("tokens"), len("ended")]
    room = width - 2 - sum(size + 2 for size in figures) - LEAST_COMPLETION
    names, sizes = table.parts, []
    for name in names:
        size = max(len(_part(name)), 6)
        if room < size + 2:
            break
        room -= size + 2
        sizes.append(size)
    shown = names[: len(sizes)]
    sizes = [*sizes, WIDEST_FIGURE, len("advantage"), len("tokens"), len("ended")]
    wide = LEAST_COMPLETION + max(0, room)

    def line(first: str, rest: Iterable[str]) -> str:
        return "  ".join(["  " + _fitted(first, wide), *(v.rjust(n) for v, n in zip(rest, sizes, strict=True))])

    lines = [title]
    if hidden := len(names) - len(shown):
        lines[0] += f", {hidden} of {len(names)} parts of the reward not shown"
    for rows in table.groups():
        images = "[image] " * len(rows[0].images)
        lines.append(_fitted(images + rows[0].prompt, width).rstrip())
        lines.append(line("completion", [*map(_part, shown), "reward", "advantage", "tokens", "ended"]))
        for row in rows:
            parts = [_figure(row.rewards.get(name)) for name in shown]
            ended = "yes" if row.finished else "cut"
            lines.append(
                line(
                    row.completion or "(empty)",
                    [*parts, _figure(row.reward), signed(row.advantage), f"{row.tokens:,}", ended],
                )
            )
            if row.extra:
                noted = ", ".join(f"{name}: {value}" for name, value in row.extra.items())
                lines.append("    " + _fitted(noted, width - 4).rstrip())
    return "\n".join(lines)


def _part(name: str) -> str:
    name = name.removesuffix("_reward") or name
    return name if len(name) <= WIDEST_PART else name[: WIDEST_PART - 1] + "…"


def _figure(value: float | None) -> str:
    return format_number(value) if is_known(value) else MISSING


def _fitted(text: str, width: int) -> str:
    """`text` on one line of exactly `width` columns: cut in its middle, since answers stand at the end."""
    # Only what can be shown is escaped: a completion may be far longer than the line.
    if len(text) > 2 * width:
        text = text[:width] + "\N{HORIZONTAL ELLIPSIS}" + text[-width:]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if _columns(shown) > width:
        half = (width - 1) // 2
        shown = _start(shown, width - 1 - half) + "…" + _start(shown[::-1], half)[::-1]
    return shown + " " * (width - _columns(shown))


def _columns(text: str) -> int:
    return sum(_column(character) for character in text)


def _column(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _start(text: str, width: int) -> str:
    taken = 0
    for place, character in enumerate(text):
        taken += _column(character)
        if taken > width:
            return text[:place]
    return text
