"""The sample table of the run report as HTML, and the cell that other tables of texts share.

Texts are escaped and cut here. It writes no file and knows nothing of the rest of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from shared.runtime.report_pictures import pictures_html
from shared.runtime.report_text import answers_match, as_number, format_number, readable

if TYPE_CHECKING:
    from shared.runtime.report import SampleRow

WIDE_COLUMNS = ("question", "completion")
SHORT_TEXT = 20  # characters that stay on one line
LONGEST_TEXT = 4_000  # characters of a sample's text on the page; report.json has it all


def samples_section(samples: Sequence[SampleRow]) -> str:
    """The sample table of the page; empty without samples."""
    if not samples:
        return ""
    extra = list(dict.fromkeys(name for row in samples for name in row.columns))
    fixed = ["question", *(["reference"] if any(row.answer.strip() for row in samples) else []), "before", "after"]
    names = (["image"] if any(row.images for row in samples) else []) + fixed
    head = "".join(f'<th scope="col">{escape(readable(name))}</th>' for name in [*names, *extra])
    body = []
    for row in samples:
        cells = [f"<td>{pictures_html(row.images)}</td>"] if "image" in names else []
        cells.append(cell("question", row.question))
        if "reference" in names:
            cells.append(cell("reference", row.answer))
        cells += [_answer_cell(name, given, row) for name, given in (("before", row.before), ("after", row.after))]
        cells += [cell(readable(name), _worded(row.columns.get(name, ""))) for name in extra]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<section><h2>Samples</h2><div class="card scroll"><table class="samples"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def cell(name: str, text: str, *, glyph: str = "", looks: str = "") -> str:
    """A cell of the sample table; `glyph` and `looks` (right, wrong) mark an answer."""
    if not text:
        return "<td></td>"
    shown = text_html(text)
    if looks:
        shown = f'<span class="answer {looks}" title="{looks}: compared with the reference">{glyph} {shown}</span>'
    short = " short" if len(text) <= SHORT_TEXT else ""
    column = f' class="{name}"' if name in WIDE_COLUMNS else ""
    return f'<td data-name="{escape(name)}"{column}><div class="text{short}">{shown}</div></td>'


def text_html(text: str) -> str:
    """`text` escaped, and cut where it is too long for a page."""
    more = len(text) - LONGEST_TEXT
    return escape(text) if more <= 0 else f"{escape(text[:LONGEST_TEXT])}… ({more:,} more characters in report.json)"


def _answer_cell(name: str, given: str | None, row: SampleRow) -> str:
    if given is None:
        return cell(name, "–")
    text = given if given.strip() else "(empty)"
    if row.answer.strip() and answers_match(given, row.answer):
        return cell(name, text, glyph="✓", looks="right")
    if not row.answer.strip() or not row.verbatim:
        return cell(name, text)
    return cell(name, text, glyph="✗", looks="wrong")


def _worded(value: object) -> str:
    number = as_number(value)
    return str(value) if number is None else format_number(number)
