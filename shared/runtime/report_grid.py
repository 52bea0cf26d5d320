"""The same prompts from the same noise before, during and after training: the grid of pictures of an image run.

A row is a prompt, a column a step. It is drawn on the page, and written as one picture that can be passed on. What is
sampled, and how it is rewarded, is the caller's.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from shared.runtime.report_pictures import Picture, picture_html
from shared.runtime.report_text import format_number
from shared.runtime.rollout_tables import add_step, is_known

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_COLUMNS = 7  # so many enlarged pictures stand side by side on the page
GAP, MARGIN, LINE = 8, 16, 18  # pixels of pictures.png
SMALLEST_CELL = 96  # pixels; narrower columns have no room for their heading
LONGEST_PROMPT = 300  # characters

GRID_STYLE = """
.steps table{width:auto}.steps :is(td,th){border:0;padding:4px 5px}.steps td{min-width:104px}
.steps img{display:block;max-width:min(144px,100%);height:auto;border-radius:6px;border:1px solid var(--line)}
.steps thead th{padding-bottom:0;white-space:normal}.steps tbody th{padding-top:14px;font-weight:500}
.steps tbody:first-of-type th{padding-top:6px}.steps .asked{position:sticky;left:5px;display:block;
width:min(100%,calc(100vw - 74px));max-width:1060px;overflow-wrap:anywhere;white-space:pre-wrap}
.steps .value{font-size:13px;color:var(--muted);font-variant-numeric:tabular-nums;padding-top:2px}
.steps .value.last{color:var(--text);font-weight:600}
"""


@dataclass
class GridColumn:
    """The pictures of all prompts at one step, in the prompts' order, and the reward of each where it is known."""

    step: int
    pictures: list[Picture]
    rewards: list[float | None]
    label: str = ""  # in the place of `step N`

    @property
    def heading(self) -> str:
        """What stands above it."""
        return self.label or ("before" if self.step == 0 else f"step {self.step:,}")


@dataclass
class PictureGrid:
    """The prompts, and the columns by ascending steps: the first, the newest, and an even choice of those between."""

    prompts: list[str] = field(default_factory=list)
    columns: list[GridColumn] = field(default_factory=list)

    def add(
        self,
        step: int,
        prompts: Sequence[str],
        images: Iterable[Image | Picture],
        rewards: Sequence[float | None] | None = None,
        label: str = "",
    ) -> None:
        """Take one more column; those of the same and of later steps go, and all of them where the prompts differ.

        Args:
            step: optimizer steps done.
            prompts: one a row.
            images: the picture of each, from the same noise as in the other columns.
            rewards: of each picture; None, or None for a picture: not known.
            label: the heading, where it is not the step.
        """
        pictures = [Picture.of(image) for image in images]
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures for {len(prompts)} prompts: give one each")
        if list(prompts) != self.prompts:
            self.prompts, self.columns = list(prompts), []
        values = [None] * len(pictures) if rewards is None else list(rewards)
        self.columns = add_step(self.columns, GridColumn(step, pictures, values, label), MOST_COLUMNS, newest=1)

    def to_json(self) -> dict[str, Any]:
        """As plain data, without the pictures."""
        return {
            "prompts": list(self.prompts),
            "columns": [{"step": c.step, "label": c.label, "rewards": list(c.rewards)} for c in self.columns],
        }

    @classmethod
    def from_json(
        cls, figures: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], *, up_to: int | None = None
    ) -> PictureGrid:
        """The grid as `to_json` gave it.

        Args:
            figures: the plain data.
            pictures: the step as text -> those of its column; a column without is left out.
            up_to: the step from which a run goes on; later columns are left out. None: all are taken.
        """
        columns = [
            GridColumn(column["step"], list(pictures[step]), column["rewards"], column["label"])
            for column in figures["columns"]
            if (step := str(column["step"])) in pictures and (up_to is None or column["step"] <= up_to)
        ]
        return cls(list(figures["prompts"]), columns)

    def html(self) -> str:
        """The section of the page; empty without pictures."""
        if not self.columns:
            return ""
        head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in self.columns)
        rewarded = any(is_known(reward) for column in self.columns for reward in column.rewards)
        body = "".join(self._row(row) for row in range(len(self.prompts)))
        return (
            '<section class="steps"><h2>Pictures</h2><p class="muted">The same prompts, each from the same noise'
            f"{'; below each picture its reward' if rewarded else ''}.</p>"
            f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div></section>'
        )

    def _row(self, row: int) -> str:
        cells = []
        for column in self.columns:
            last = " last" if column is self.columns[-1] and len(self.columns) > 1 else ""
            reward = column.rewards[row]
            value = f'<div class="value{last}">{format_number(reward)}</div>' if is_known(reward) else ""
            cells.append(f"<td>{picture_html(column.pictures[row], column.heading)}{value}</td>")
        asked = f'<span class="asked">{escape(_cut(self.prompts[row]))}</span>'
        return (
            f'<tbody><tr><th scope="rowgroup" colspan="{len(self.columns)}">{asked}</th></tr>'
            f"<tr>{''.join(cells)}</tr></tbody>"
        )

    def png(self) -> bytes:
        """The grid as one picture, prompts and headings in letters."""
        from PIL import Image, ImageDraw, ImageFont

        shown = [[picture.image().convert("RGB") for picture in column.pictures] for column in self.columns]
        across = max(SMALLEST_CELL, *(image.width for column in shown for image in column))
        heights = [max(column[row].height for column in shown) for row in range(len(self.prompts))]
        width = 2 * MARGIN + len(shown) * (across + GAP) - GAP
        font = ImageFont.load_default(13)
        height = 2 * MARGIN + LINE + sum(LINE + each + LINE + GAP for each in heights)
        page = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(page)
        top = MARGIN
        for at, column in enumerate(self.columns):
            draw.text((MARGIN + at * (across + GAP), top), column.heading, fill="#5c6675", font=font)
        top += LINE
        for row, prompt in enumerate(self.prompts):
            draw.text((MARGIN, top), _fitted(prompt, width - 2 * MARGIN, font), fill="#1b2330", font=font)
            top += LINE
            for at, column in enumerate(self.columns):
                left = MARGIN + at * (across + GAP)
                page.paste(shown[at][row], (left, top))
                if is_known(column.rewards[row]):
                    below = (left, top + heights[row] + 1)
                    draw.text(below, format_number(column.rewards[row]), fill="#5c6675", font=font)
            top += heights[row] + LINE + GAP
        file = io.BytesIO()
        page.save(file, "PNG")
        return file.getvalue()


def _cut(prompt: str) -> str:
    return prompt if len(prompt) <= LONGEST_PROMPT else prompt[:LONGEST_PROMPT] + "…"


def _fitted(prompt: str, width: int, font: Any) -> str:
    """`prompt` on one line of `width` pixels, its end left out where it is longer."""
    text = " ".join(_cut(prompt).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
