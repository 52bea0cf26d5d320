"""Sample tables of an online run: which are kept, how report.json holds them, how a terminal shows them.

A table is what was sampled and how it was rewarded at one step. Nothing is computed here; the page shows the tables by
`report_rollouts`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from shared.runtime.report_pictures import Picture
from shared.runtime.report_text import MISSING, format_number

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TABLES = 20
NEWEST = 10  # of those, kept without gaps
LEAST_COMPLETION, LEAST_NUMBER = 24, 8  # columns of the terminal; parts of a reward give way to them
WIDEST_PART = 12
WIDEST_FIGURE = 9
HEADS = {"advantage": "advantage", "tokens": "tokens", "finished": "ended"}

Step = TypeVar("Step")


@dataclass
class RolloutRow:
    """One output, a completion or pictures, and its rewards.

    Attributes:
        images: the prompt's PIL images, or what is left of them in a kept table.
        prompt, completion: as text, special tokens included where they matter; a picture's completion is empty.
        rewards: part -> value; None or NaN where it does not apply.
        reward: the weighted sum of the parts; None where none applies.
        advantage: as the loss uses it; None: it uses none.
        tokens: the completion's length, the ending token included; None: it has no tokens.
        finished: whether it ended by itself; False: cut at the longest length allowed. None: nothing is cut.
        group: which prompt of the table it belongs to. None: told apart by prompt and images.
        extra: column -> what a reward noted of the row, as text.
        output_images: PIL images that are the output, or what is left of them in a kept table.
    """

    images: list[Image | Picture]
    prompt: str
    completion: str
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float | None
    tokens: int | None
    finished: bool | None
    group: int | None = None
    extra: dict[str, str] = field(default_factory=dict)
    output_images: list[Image | Picture] = field(default_factory=list)


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
    def output(self) -> str:
        """What its outputs are called."""
        return "picture" if any(row.output_images or row.tokens is None for row in self.rows) else "completion"

    @property
    def single(self) -> bool:
        """Whether its rows are pictures, one of each prompt, and better shown together."""
        return self.output == "picture" and all(len(group) == 1 for group in self.groups())

    @property
    def figures(self) -> list[str]:
        """Which of `advantage`, `tokens` and `finished` its rows have."""
        names = ("advantage", "tokens", "finished")
        return [name for name in names if any(getattr(row, name) is not None for row in self.rows)]

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
            for row in group:
                rows.append(replace(row, images=pictures, output_images=[*map(Picture.of, row.output_images)]))
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

    The first table and the newest NEWEST stay; see `add_step`.
    """
    return add_step(tables, table, MOST_TABLES, newest=NEWEST)


def add_step(kept: Sequence[Step], new: Step, most: int, *, newest: int) -> list[Step]:
    """What was kept of some steps (ascending), and of one more, thinned to `most`.

    What is of the same or a later step is dropped: a run that went back to a checkpoint samples it again. The first
    one and the newest stay; of those between, one that has the closest neighbours goes, so that the rest remain evenly
    spread over the run.

    Args:
        kept: anything with a `step`.
        new: one more of the kind.
        most: how many are kept.
        newest: how many of the newest are kept without gaps.
    """
    found = [one for one in kept if one.step < new.step] + [new]
    while len(found) > most:
        between = range(1, len(found) - newest)
        del found[min(between, key=lambda place: found[place + 1].step - found[place - 1].step)]
    return found


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
                            **({"images": len(row.output_images)} if row.output_images else {}),
                        }
                        for row in rows
                    ],
                }
                for rows in table.groups()
            ],
        }
        for table in tables
    ]


def from_json(
    tables: Iterable[Mapping[str, Any]],
    *,
    up_to: int | None = None,
    pictures: Mapping[str, Sequence[Sequence[Picture]]] | None = None,
) -> list[RolloutTable]:
    """Tables as `to_json` gave them, without the pictures of their prompts.

    Args:
        tables: the plain data.
        up_to: the step from which a run goes on; what was sampled after it is left out. None: all.
        pictures: the step as text -> the pictures that are the output of each row, where they were kept.
    """
    found = []
    for table in tables:
        if up_to is not None and table["step"] > up_to:
            continue
        given = [
            (place, prompt["prompt"], row)
            for place, prompt in enumerate(table["prompts"])
            for row in prompt["completions"]
        ]
        outputs = (pictures or {}).get(str(table["step"]), [[]] * len(given))
        rows = [_row(prompt, row, at, shown) for (at, prompt, row), shown in zip(given, outputs, strict=True)]
        found.append(RolloutTable(table["step"], rows))
    return found


def _row(prompt: str, row: Mapping[str, Any], group: int, shown: Sequence[Picture]) -> RolloutRow:
    advantage = row["advantage"]
    if advantage is None and row["tokens"] is not None:
        advantage = math.nan
    return RolloutRow(
        [],
        prompt,
        row["completion"],
        dict(row["rewards"]),
        row["reward"],
        advantage,
        row["tokens"],
        row["finished"],
        group=group,
        extra=dict(row.get("extra", {})),
        output_images=list(shown),
    )


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
    mean, asked = table.mean_reward, table.figures
    title = f"Rollouts at step {table.step:,}" + (
        "" if mean is None else f" (mean reward of those shown {format_number(mean)})"
    )
    heads = ["reward", *(HEADS[name] for name in asked)]
    figures = [WIDEST_FIGURE, *(len(head) for head in heads[1:])]
    numbered = table.output == "picture" and not table.single
    least = LEAST_NUMBER if numbered else LEAST_COMPLETION
    room = width - 2 - sum(size + 2 for size in figures) - least
    names, sizes = table.parts, []
    for name in names:
        size = max(len(_part(name)), 6)
        if room < size + 2:
            break
        room -= size + 2
        sizes.append(size)
    shown = names[: len(sizes)]
    sizes += figures
    wide = least if numbered else least + max(0, room)

    def line(first: str, rest: Iterable[str]) -> str:
        return "  ".join(["  " + _fitted(first, wide), *(v.rjust(n) for v, n in zip(rest, sizes, strict=True))])

    lines = [title]
    if hidden := len(names) - len(shown):
        lines[0] += f", {hidden} of {len(names)} parts of the reward not shown"
    head = [*map(_part, shown), *heads]
    if table.single:
        lines.append(line("picture of", head))
    for rows in table.groups():
        asked_for = "[image] " * len(rows[0].images) + rows[0].prompt
        if not table.single:
            lines.append(_fitted(asked_for, width).rstrip())
            lines.append(line(table.output, head))
        for at, row in enumerate(rows, start=1):
            parts = [_figure(row.rewards.get(name)) for name in shown]
            said = row.completion or "(empty)"
            if table.output == "picture":
                said = asked_for if table.single else f"{at} of {len(rows)}"
            lines.append(line(said, [*parts, _figure(row.reward), *(_fact(row, name) for name in asked)]))
            if row.extra:
                noted = ", ".join(f"{name}: {value}" for name, value in row.extra.items())
                lines.append("    " + _fitted(noted, width - 4).rstrip())
    return "\n".join(lines)


def _fact(row: RolloutRow, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return MISSING
    if name == "finished":
        return "yes" if value else "cut"
    return signed(value) if name == "advantage" else f"{value:,}"


def part_name(name: str) -> str:
    """How a reward is called where all are rewards."""
    return name.removesuffix("_reward") or name


def _part(name: str) -> str:
    name = part_name(name)
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
