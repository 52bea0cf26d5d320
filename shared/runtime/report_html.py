"""The run report as one HTML page: no scripts, no fonts, nothing fetched; light and dark by the reader's system.

Every text that comes from outside passes `html.escape`, and the page forbids scripts and connections by its own
content policy, so that an answer of a model that looks like markup stays a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from shared.runtime.report_curves import chart, group_metrics, last_step, unit_of, worth_drawing
from shared.runtime.report_grid import GRID_STYLE, PictureGrid
from shared.runtime.report_rollouts import ROLLOUT_STYLE, rollouts_section
from shared.runtime.report_samples import PAIR_STYLE, are_pairs, samples_section
from shared.runtime.report_text import (
    compare,
    format_bytes,
    format_duration,
    format_number,
    format_throughput,
    is_share,
    readable,
)

if TYPE_CHECKING:
    from shared.runtime.report import SampleRow
    from shared.runtime.rollout_tables import RolloutTable

STATUS_GLYPHS = {"finished": "✓", "interrupted": "‖", "failed": "✗"}

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b2330;--muted:#5c6675;--line:#dde1e8;--grid:#e9ecf1;
--good:#13703f;--good-bg:#e3f4ea;--bad:#b3261e;--bad-bg:#fbe9e7;--warn:#8a5300;--warn-bg:#fdf1dc;--raw:.38;
--c0:#1f5fbf;--c1:#c2500c;--c2:#0b7a6d;--c3:#8a3ab9;--c4:#b3266b;--c5:#557a12;--c6:#8a6a00;--c7:#4a5568}
@media (prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1a2029;--text:#e4e8ef;--muted:#9aa5b5;--line:#2e3744;
--grid:#262e3a;--good:#6fd39a;--good-bg:#15352a;--bad:#ff9a8f;--bad-bg:#40211f;--warn:#f3c069;--warn-bg:#3b2d14;
--c0:#7fb0ff;--c1:#ff9d5c;--c2:#4fd0bf;--c3:#cf9bf5;--c4:#ff8fc0;--c5:#b2d56a;--c6:#e6c350;--c7:#b4bfce}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 56px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 12px}h3{font-size:15px;margin:0 0 4px}
p{margin:4px 0}.muted{color:var(--muted)}.scroll{overflow-x:auto}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:0}
.status{display:inline-block;border-radius:99px;padding:1px 11px;margin-right:8px;font-weight:600;font-size:14px}
.finished,.right{color:var(--good);background:var(--good-bg)}.failed,.wrong{color:var(--bad);background:var(--bad-bg)}
.interrupted{color:var(--warn);background:var(--warn-bg)}.status.other{border:1px solid var(--line)}
.notes{margin:16px 0 0;padding:12px 16px 12px 34px;overflow-wrap:anywhere}.notes li{white-space:pre-wrap}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:8px 12px;
border-bottom:1px solid var(--line)}tbody tr:last-child>*{border-bottom:0}thead th{color:var(--muted);font-size:13px;
font-weight:600;white-space:nowrap}tbody th{font-weight:500}
.figures td,.figures th+th{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.figures td.bar{width:34%;min-width:130px;text-align:left}
.bar svg{display:block;width:100%;height:20px;overflow:visible}
.up{color:var(--good);font-weight:600}.down{color:var(--bad);font-weight:600}.after{font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:16px}
.charts details{margin-top:4px}.charts .figures{font-size:13px}.charts .figures :is(td,th){padding:3px 10px}
.chart{display:block;width:100%;height:auto}.chart text{fill:var(--muted);font-size:12.5px;
font-variant-numeric:tabular-nums}.grid{stroke:var(--grid);fill:none}.axis{stroke:var(--muted);fill:none}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round}.raw{opacity:var(--raw);stroke-width:1;stroke-dasharray:none!important}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}.line{stroke:var(--c)}circle{fill:var(--c)}
path.d1{stroke-dasharray:7 4}path.d2{stroke-dasharray:2 3}path.d3{stroke-dasharray:9 3 2 3}
.lost{stroke:var(--bad);stroke-width:1.6;fill:none}.warn{color:var(--warn);font-size:13px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 6px;padding:0;font-size:13px}
.key{width:22px;height:8px;margin-right:6px;vertical-align:middle}
.pictures{display:flex;flex-wrap:wrap;align-items:flex-start;gap:6px}
.pictures img{display:block;max-width:144px;height:auto;
border-radius:6px;border:1px solid var(--line)}.many img{max-width:88px}
.samples .text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:15em;overflow:auto}.samples td{min-width:84px}
.samples .question{min-width:170px}.samples .short{white-space:nowrap}.many{min-width:182px}
.answer{display:inline-block;border-radius:6px;padding:1px 8px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:16px}
.two h3{margin-bottom:6px}.two .figures :is(td,th){padding:5px 0}
summary{cursor:pointer;color:var(--muted);font-size:13px}.fold{margin-top:12px}.fold>summary{font-size:15px;
color:var(--text);font-weight:600}.fold table{margin-top:8px;font-size:13.5px}.fold :is(td,th){padding:4px 10px 4px 0}
.fold td{overflow-wrap:anywhere;font-family:ui-monospace,Menlo,Consolas,monospace}.fold th{width:36%}
@media (max-width:640px){main{padding:20px 12px 40px}.figures td.bar,.figures th.bar{display:none}
th,td{padding:7px 8px}.samples thead{display:none}.samples :is(tr,td){display:block}
.samples tr{border-bottom:1px solid var(--line);padding:10px 0}.samples tr:last-child{border:0}
.samples td{border:0;padding:3px 0}.samples td:empty{display:none}
.samples td[data-name]{display:grid;grid-template-columns:84px 1fr}
.samples td[data-name]::before{content:attr(data-name);color:var(--muted);font-size:13px}}
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(
    figures: Mapping[str, Any],
    samples: Sequence[SampleRow],
    units: Mapping[str, str],
    rollouts: Sequence[RolloutTable] = (),
    grid: PictureGrid | None = None,
) -> str:
    """The page.

    Args:
        figures: what report.json holds, before NaN is turned into null.
        samples: the rows of the sample table, with their images.
        units: metric -> what its vertical axis counts.
        rollouts: the tables of an online run, oldest first, with their images.
        grid: the pictures of an image run.
    """
    title, drawn = escape(figures["title"]), grid.html() if grid else ""
    body = "".join(
        [
            _header(figures),
            _comparison(figures["before"], figures["after"]),
            drawn,
            _curves(figures["curves"], units),
            samples_section(samples),
            rollouts_section(rollouts),
            _resources(figures["throughput"], figures["peak_memory"]),
            _facts("Configuration", figures["config"]),
            _facts("Environment", figures["environment"]),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{STYLE}{ROLLOUT_STYLE if rollouts else ''}{GRID_STYLE if drawn else ''}"
        f"{PAIR_STYLE if are_pairs(samples) else ''}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(figures: Mapping[str, Any]) -> str:
    status = figures["status"]
    looks = status if status in STATUS_GLYPHS else "other"
    glyph = STATUS_GLYPHS.get(status, "•")
    lines = "".join(f"<li>{escape(note)}</li>" for note in figures["notes"])
    notes = f'<ul class="card notes">{lines}</ul>' if lines else ""
    return (
        f'<header><h1>{escape(figures["title"])}</h1><p><span class="status {looks}">{glyph} {escape(status)}</span>'
        f"{escape(_summary(figures))}</p>{notes}</header>"
    )


def _summary(figures: Mapping[str, Any]) -> str:
    parts = []
    step, throughput, memory = last_step(figures["curves"]), figures["throughput"], figures["peak_memory"]
    if step is not None:
        parts.append(f"{step:,} steps" if step != 1 else "1 step")
    if "train_seconds" in throughput:
        parts.append(format_duration(throughput["train_seconds"]))
    if "samples_per_second" in throughput:
        parts.append(f"{format_number(throughput['samples_per_second'])} samples/s")
    parts += [f"peak memory {format_bytes(size)} ({place})" for place, size in memory.items()]
    parts.append(f"written {figures['written']}")
    unbroken = str.maketrans(" -", "\N{NO-BREAK SPACE}\N{NON-BREAKING HYPHEN}")
    return " · ".join(part.translate(unbroken) for part in parts)


def _comparison(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = compare(before, after)
    if not rows:
        return ""
    drawn = any(is_share(row.what) for row in rows)
    body = []
    for row in rows:
        arrow, looks = {None: ("", ""), True: ("▲ ", "up"), False: ("▼ ", "down")}[row.better]
        if row.better is not None:
            arrow = "▲ " if row.change.startswith("+") else "▼ "
        bar = f'<td class="bar">{_bar(row.what, before, after)}</td>' if drawn else ""
        body.append(
            f'<tr><th scope="row">{escape(readable(row.what))}</th><td>{row.before}</td>'
            f'<td class="after">{row.after}</td><td class="{looks}">{arrow}{row.change}</td>{bar}</tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("what", "before", "after", "change"))
    head += '<th scope="col" class="bar">0 … 100 %</th>' if drawn else ""
    return (
        f'<section><h2>Before and after training</h2><div class="card scroll"><table class="figures"><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _bar(what: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """A line from the share before (ring) to the share after (dot), on a track from 0 to 100 %."""
    shares = [side.get(what) for side in (before, after)]
    if not is_share(what) or any(share is None or not 0 <= share <= 1 for share in shares):
        return ""
    start, end = (f"{100 * share:.1f}%" for share in shares)
    return (
        f'<svg class="c0" aria-hidden="true"><line x1="0" x2="100%" y1="10" y2="10" stroke="var(--line)" '
        f'stroke-width="4" stroke-linecap="round"/><line x1="{start}" x2="{end}" y1="10" y2="10" stroke="var(--c)" '
        f'stroke-width="4"/><circle cx="{start}" cy="10" r="4.5" style="fill:var(--card)" stroke="var(--c)" '
        f'stroke-width="2"/><circle cx="{end}" cy="10" r="5.5"/></svg>'
    )


def _curves(curves: Mapping[str, Any], units: Mapping[str, str]) -> str:
    charts = "".join(
        chart(title, dict(curves), metrics, units.get(title) or unit_of(title))
        for title, metrics in group_metrics(worth_drawing(curves)).items()
    )
    return f'<section><h2>Curves</h2><div class="charts">{charts}</div></section>' if charts else ""


def _resources(throughput: Mapping[str, float], memory: Mapping[str, float]) -> str:
    tables = []
    speeds = {name: format_throughput(name, value) for name, value in throughput.items()}
    for title, rows in (
        # A duration carries its own unit, which is not always the second.
        ("Throughput", {readable(name.replace("_seconds", "_time")): value for name, value in speeds.items()}),
        ("Peak memory", {readable(place): format_bytes(size) for place, size in memory.items()}),
    ):
        body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows.items())
        if body:
            table = f'<table class="figures"><tbody>{body}</tbody></table>'
            tables.append(f'<div class="card"><h3>{title}</h3>{table}</div>')
    return f'<section><h2>Speed and memory</h2><div class="two">{"".join(tables)}</div></section>' if tables else ""


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_fact(value))}</td></tr>' for name, value in facts.items()
    )
    return (
        f'<details class="card fold"><summary>{title} <span class="muted">({len(facts)})</span></summary>'
        f"<table><tbody>{rows}</tbody></table></details>"
    )


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
