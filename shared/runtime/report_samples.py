"""The samples of the run report as HTML, and the cell that other tables of texts share.

Texts are escaped and cut here. It writes no file and knows nothing of the rest of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from shared.runtime.report_pictures import picture_html, pictures_html
from shared.runtime.report_text import answers_match, as_number, format_number, readable

if TYPE_CHECKING:
    from shared.runtime.report import SampleRow

WIDE_COLUMNS = ("question", "completion")
SHORT_TEXT = 20  # characters that stay on one line
LONGEST_TEXT = 4_000  # characters of a sample's text on the page; report.json has it all

PAIR_STYLE = """
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
.pairs .card{padding:12px 14px}.pairs .text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:9em;overflow:auto}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:12px;margin-top:8px}.sides figure{margin:0}
.sides figcaption{color:var(--muted);font-size:13px}.sides .text{font-size:13px;margin-top:4px}
.sides img{display:block;max-width:min(144px,100%);height:auto;border-radius:6px;border:1px solid var(--line)}
"""


def are_pairs(samples: Sequence[SampleRow]) -> bool:
    """Whether what was answered are pictures."""
    return any(row.before_images or row.after_images for row in samples)


def samples_section(samples: Sequence[SampleRow]) -> str:
    """The samples of the page, a table of answers or pairs of pictures; empty without samples."""
    if not samples:
        return ""
    extra = list(dict.fromkeys(name for row in samples for name in row.columns))
    if are_pairs(samples):
        return f'<section><h2>Samples</h2><div class="pairs">{"".join(map(_pair, samples))}</div></section>'
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


def _pair(row: SampleRow) -> str:
    """The pictures before and after training side by side, what was asked for above them."""
    sides = []
    for name, images, said in (("before", row.before_images, row.before), ("after", row.after_images, row.after)):
        shown = "".join(picture_html(image, name) for image in images) or '<p class="muted">–</p>'
        words = f'<div class="text">{text_html(said)}</div>' if said else ""
        sides.append(f"<figure><figcaption>{name}</figcaption>{shown}{words}</figure>")
    more = "".join(
        f'<div class="muted">{escape(readable(name))}: {text_html(_worded(value))}</div>'
        for name, value in row.columns.items()
    )
    asked = f'{pictures_html(row.images) if row.images else ""}<div class="text">{text_html(row.question)}</div>{more}'
    return f'<div class="card">{asked}<div class="sides">{"".join(sides)}</div></div>'


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
