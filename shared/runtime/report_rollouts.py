"""The rollouts of an online run as HTML: the newest step open, earlier ones to unfold.

Completions stand under their prompt, in the looks of the sample table. What the tables hold is `rollout_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shared.runtime.report_pictures import pictures_html
from shared.runtime.report_samples import cell, text_html
from shared.runtime.report_text import format_number, readable
from shared.runtime.rollout_tables import RolloutRow, RolloutTable, is_known, signed

PROMPTS_SHOWN, COMPLETIONS_SHOWN = 8, 16  # of one step, and of one prompt; report.json has all

ROLLOUT_STYLE = """
.rollouts{margin-bottom:10px;padding:12px 16px}.rollouts>summary{font-size:15px;color:var(--text);font-weight:600}
.prompt{margin-top:16px;padding-top:14px;border-top:1px solid var(--line)}
.asked{display:flex;flex-wrap:wrap;gap:8px 16px;margin-bottom:6px}.asked .text{flex:1 1 320px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:15em;overflow:auto;font-weight:500}
.rollouts .samples{font-size:14px}.rollouts .samples :is(td,th){padding:6px 10px}
.rollouts .samples .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;min-width:0}
.rollouts .samples .completion{min-width:260px;width:60%}
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
    groups, parts = table.groups(), table.parts
    facts = [f"{_count(len(table.rows), 'completion')} of {_count(len(groups), 'prompt')}"]
    if table.mean_reward is not None:
        facts.insert(0, f"mean reward of those shown {format_number(table.mean_reward)}")
    body = "".join(_prompt(rows, parts, table.extras) for rows in groups[:PROMPTS_SHOWN])
    return (
        f'<details class="card rollouts"{" open" if unfolded else ""}><summary>Step {table.step:,} '
        f'<span class="muted">({", ".join(facts)})</span></summary>{body}'
        f"{_rest(len(groups) - PROMPTS_SHOWN, 'prompt')}</details>"
    )


def _prompt(rows: Sequence[RolloutRow], parts: Sequence[str], extras: Sequence[str]) -> str:
    asked = rows[0]
    pictures = pictures_html(asked.images) if asked.images else ""
    names = [readable(name) for name in parts]
    figures = [*names, "reward", "advantage", "tokens"]
    head = '<th scope="col">completion</th>' + "".join(
        f'<th scope="col" class="num">{escape(name)}</th>' for name in figures
    )
    noted = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("ended", *extras))
    body = "".join(_completion(row, parts, names, extras) for row in rows[:COMPLETIONS_SHOWN])
    return (
        f'<div class="prompt"><div class="asked">{pictures}<div class="text">{text_html(asked.prompt)}</div></div>'
        f'<div class="scroll"><table class="samples"><thead><tr>{head}{noted}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{_rest(len(rows) - COMPLETIONS_SHOWN, 'completion')}</div>"
    )


def _completion(row: RolloutRow, parts: Sequence[str], names: Sequence[str], extras: Sequence[str]) -> str:
    looks = "up" if row.advantage > 0 else "down" if row.advantage < 0 else ""
    rewards = [(name, _reward(row.rewards.get(part))) for part, name in zip(parts, names, strict=True)]
    cells = [
        cell("completion", row.completion if row.completion.strip() else "(empty)"),
        *(_figure(name, reward) for name, reward in rewards),
        _figure("reward", _reward(row.reward)),
        _figure("advantage", signed(row.advantage), looks),
        _figure("tokens", f"{row.tokens:,}"),
        cell("ended", "✓" if row.finished else "cut"),
        *(cell(name, row.extra.get(name, "")) for name in extras),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _reward(value: float | None) -> str:
    return format_number(value) if is_known(value) else "–"


def _figure(name: str, text: str, looks: str = "") -> str:
    return f'<td data-name="{escape(name)}" class="{" ".join(["num", looks]).strip()}">{escape(text)}</td>'


def _rest(more: int, what: str) -> str:
    return f'<p class="muted">{_count(more, f"more {what}")} in report.json</p>' if more > 0 else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
