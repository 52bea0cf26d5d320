"""The rollouts of an online run as HTML: the newest step open, earlier ones to unfold.

Completions stand under their prompt, in the looks of the sample table; pictures side by side. What the tables hold is
`rollout_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shared.runtime.report_pictures import picture_html, pictures_html
from shared.runtime.report_samples import cell, text_html
from shared.runtime.report_text import format_number, readable
from shared.runtime.rollout_tables import HEADS, RolloutRow, RolloutTable, is_known, part_name, signed

PROMPTS_SHOWN, OUTPUTS_SHOWN = 8, 16  # of one step, and of one prompt; report.json has all

ROLLOUT_STYLE = """
.rollouts{margin-bottom:10px;padding:12px 16px}.rollouts>summary{font-size:15px;color:var(--text);font-weight:600}
.prompt{margin-top:16px;padding-top:14px;border-top:1px solid var(--line)}
.asked{display:flex;flex-wrap:wrap;gap:8px 16px;margin-bottom:6px}.asked .text{flex:1 1 320px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:15em;overflow:auto;font-weight:500}
.rollouts .samples{font-size:14px}.rollouts .samples :is(td,th){padding:6px 10px}
.rollouts .samples .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;min-width:0}
.rollouts .samples .completion{min-width:260px;width:60%}
.drawn{display:flex;flex-wrap:wrap;gap:12px}.drawn figure{margin:0;font-size:13px;width:144px}
.drawn .of{font-size:14px;overflow-wrap:anywhere;max-height:6em;overflow:auto;margin-bottom:4px}
.drawn img{display:block;max-width:100%;height:auto;border-radius:6px;border:1px solid var(--line);margin-bottom:4px}
.drawn figcaption{display:grid;grid-template-columns:1fr auto;gap:0 8px;font-variant-numeric:tabular-nums}
.drawn figcaption :nth-child(odd){color:var(--muted);overflow-wrap:break-word;min-width:0}
.drawn figcaption :nth-child(even){text-align:right}
@media (max-width:640px){.rollouts .samples .completion{width:auto}.rollouts .samples .num{text-align:left;
white-space:normal}.rollouts .samples td[data-name]{grid-template-columns:96px 1fr;gap:8px}
.rollouts .samples td::before{font-weight:400}}
"""


def rollouts_section(tables: Sequence[RolloutTable]) -> str:
    """The section of the page; `tables` have ascending steps. Empty without tables."""
    if not tables:
        return ""
    newest = tables[-1]
    shown = "".join(_table(table, unfolded=table is newest) for table in reversed(tables))
    return f"<section><h2>Rollouts</h2>{shown}</section>"


def _table(table: RolloutTable, *, unfolded: bool) -> str:
    groups = table.groups()
    facts = [f"{_count(len(table.rows), table.output)} of {_count(len(groups), 'prompt')}"]
    if table.mean_reward is not None:
        facts.insert(0, f"mean reward of those shown {format_number(table.mean_reward)}")
    if table.single:
        body = f'<div class="prompt">{_drawn([rows[0] for rows in groups[:OUTPUTS_SHOWN]], table)}</div>'
        more = _rest(len(groups) - OUTPUTS_SHOWN, "prompt")
    else:
        body = "".join(_prompt(rows, table) for rows in groups[:PROMPTS_SHOWN])
        more = _rest(len(groups) - PROMPTS_SHOWN, "prompt")
    return (
        f'<details class="card rollouts"{" open" if unfolded else ""}><summary>Step {table.step:,} '
        f'<span class="muted">({", ".join(facts)})</span></summary>{body}{more}</details>'
    )


def _prompt(rows: Sequence[RolloutRow], table: RolloutTable) -> str:
    asked, shown = rows[0], rows[:OUTPUTS_SHOWN]
    pictures = pictures_html(asked.images) if asked.images else ""
    outputs = _drawn(shown, table) if table.output == "picture" else _written(shown, table)
    return (
        f'<div class="prompt"><div class="asked">{pictures}<div class="text">{text_html(asked.prompt)}</div></div>'
        f"{outputs}{_rest(len(rows) - OUTPUTS_SHOWN, table.output)}</div>"
    )


def _drawn(rows: Sequence[RolloutRow], table: RolloutTable) -> str:
    """Pictures side by side, their figures below them."""
    parts = table.parts if len(table.parts) > 1 else []
    body = ""
    for at, row in enumerate(rows, start=1):
        shown = "".join(picture_html(image, f"picture {at} of {len(rows)}") for image in row.output_images)
        facts = [(readable(part_name(name)), _reward(row.rewards.get(name)), "") for name in parts]
        facts.append(("reward", _reward(row.reward), ""))
        if "advantage" in table.figures:
            facts.append(("advantage", *_advantage(row)))
        facts += [(name, row.extra.get(name, ""), "") for name in table.extras]
        said = "".join(
            f'<span>{escape(name)}</span><span class="{looks}">{text_html(text)}</span>' for name, text, looks in facts
        )
        asked = f'<div class="of">{text_html(row.prompt)}</div>' if table.single else ""
        body += f"<figure>{asked}{shown}<figcaption>{said}</figcaption></figure>"
    return f'<div class="drawn">{body}</div>'


def _written(rows: Sequence[RolloutRow], table: RolloutTable) -> str:
    """Completions as a table, one row each."""
    names = [readable(name) for name in table.parts]
    known = [name for name in table.figures if name != "finished"]
    head = '<th scope="col">completion</th>' + "".join(
        f'<th scope="col" class="num">{escape(name)}</th>' for name in (*names, "reward", *known)
    )
    ended = [HEADS["finished"]] if "finished" in table.figures else []
    noted = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*ended, *table.extras))
    body = "".join(_completion(row, table, names) for row in rows)
    return (
        f'<div class="scroll"><table class="samples"><thead><tr>{head}{noted}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _completion(row: RolloutRow, table: RolloutTable, names: Sequence[str]) -> str:
    rewards = [(name, _reward(row.rewards.get(part))) for part, name in zip(table.parts, names, strict=True)]
    known = table.figures
    cells = [
        cell("completion", row.completion if row.completion.strip() else "(empty)"),
        *(_figure(name, reward) for name, reward in rewards),
        _figure("reward", _reward(row.reward)),
        *([_figure("advantage", *_advantage(row))] if "advantage" in known else []),
        *([_figure("tokens", f"{row.tokens:,}")] if "tokens" in known else []),
        *([cell("ended", "✓" if row.finished else "cut")] if "finished" in known else []),
        *(cell(name, row.extra.get(name, "")) for name in table.extras),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _advantage(row: RolloutRow) -> tuple[str, str]:
    """Its words and looks."""
    if row.advantage is None:
        return "–", ""
    return signed(row.advantage), "up" if row.advantage > 0 else "down" if row.advantage < 0 else ""


def _reward(value: float | None) -> str:
    return format_number(value) if is_known(value) else "–"


def _figure(name: str, text: str, looks: str = "") -> str:
    return f'<td data-name="{escape(name)}" class="{" ".join(["num", looks]).strip()}">{escape(text)}</td>'


def _rest(more: int, what: str) -> str:
    return f'<p class="muted">{_count(more, f"more {what}")} in report.json</p>' if more > 0 else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
