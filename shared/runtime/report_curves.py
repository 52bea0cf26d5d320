"""The curves of a run: read from a trainer's log, grouped into charts, drawn as inline SVG.

The drawing uses CSS classes alone (`report_html.STYLE` colours them), so that it follows the light or dark theme. It
does not interact and does not use a log scale. Whatever is drawn is thinned to what the eye can see; the numbers
themselves are all in report.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from shared.runtime.report_text import REWARD_PART, as_number, format_metric, is_duration, is_share, readable

Curves = dict[str, dict[str, list]]  # metric -> {"step": [...], "value": [...]}

NOT_CURVES = frozenset({"step", "epoch", "total_flos"})
REWARD_MEANS, REWARD_STDS, PASS = "rewards by part", "rewards by part, std", "pass@k"
ONE_CHART = frozenset({"time", "tokens_per_second", "images_per_second", "alarms"})  # share a chart, by the stroke
UNITS = {
    "time": "seconds",
    "tokens_per_second": "tokens/s",
    "images_per_second": "images/s",
    "completions/length": "tokens",
}
# of less interest than what was learnt
LAST_CHARTS = ("time", "tokens_per_second", "images_per_second", "learning_rate", "grad_norm")
COLOURS = 8  # classes c0 … c7 of the style sheet
SMOOTH_FROM = 30  # points; below that the raw line is readable by itself
MARKERS_UP_TO = 40
TABLE_ROWS = 40
RARE = 5  # per cent
LARGEST = 1e100  # beyond that a value is as good as infinite, and the arithmetic of the axes would overflow

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 40


def curves_from_log(log_history: Sequence[Mapping]) -> Curves:
    """Metric -> steps (ascending) and values, from `state.log_history` of a transformers trainer.

    A step that appears twice (a resumed run logs again what it does again) keeps its last value. The closing summary
    of a run (the entry with `train_runtime`), evaluation speeds, epochs and entries without a step are no curves.
    """
    values: dict[str, dict[int, float]] = {}
    for entry in log_history:
        if "step" not in entry or "train_runtime" in entry:
            continue
        for metric, given in entry.items():
            number = as_number(given)
            if number is None or metric in NOT_CURVES or metric.endswith(("_runtime", "_per_second")):
                continue
            values.setdefault(metric, {})[int(entry["step"])] = number
    return {
        metric: {"step": sorted(by_step), "value": [by_step[step] for step in sorted(by_step)]}
        for metric, by_step in values.items()
    }


def last_step(curves: Curves) -> int | None:
    """The last step that any curve knows."""
    return max((curve["step"][-1] for curve in curves.values() if curve["step"]), default=None)


def worth_drawing(curves: Curves) -> list[str]:
    """The metrics without the parts of a reward that are drawn as the whole: those of one that is alone."""
    return [metric for metric in curves if curves[metric] != curves.get(_whole(metric))]


def _whole(metric: str) -> str | None:
    """`eval_reward` of `eval_rewards/NAME/mean`, `reward_std` of `rewards/NAME/std`; None of what is no part."""
    found = REWARD_PART.match(metric)
    if found is None:
        return None
    return ("eval_" if metric.startswith("eval_") else "") + ("reward" if metric.endswith("/mean") else "reward_std")


def group_metrics(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Chart title -> the metrics drawn in it: a metric with its `eval_` twin, all kinds of one share together.

    The charts of an online run start with its reward, then what was measured on held-out rows alone; those of other
    runs with the loss. Speeds and the optimizer's figures come last.
    """
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        groups.setdefault(_family(metric.removeprefix("eval_")), []).append(metric)
    held_out = [title for title, group in groups.items() if all(metric.startswith("eval_") for metric in group)]
    first = ["reward", PASS, REWARD_MEANS, *held_out, "loss"] if "reward" in groups else ["loss", *held_out]
    rest = [title for title in groups if title not in LAST_CHARTS]
    order = dict.fromkeys([*(title for title in first if title in rest), *rest, *LAST_CHARTS])
    return {title: groups[title] for title in order if title in groups}


def _family(metric: str) -> str:
    """The title of the chart that `metric` (without `eval_`) is drawn in."""
    parts = metric.split("/")
    first, last = parts[0], parts[-1]
    if first.startswith("pass@"):
        return PASS
    if first == "rewards" and len(parts) > 2 and last in {"mean", "std"}:
        return REWARD_MEANS if last == "mean" else REWARD_STDS
    if first == "completions" and last.endswith("length"):
        return "completions/length"
    if first == "sampling" and len(parts) > 2:
        return "/".join(parts[:-1])
    return first if first in ONE_CHART or is_share(first) else metric


def unit_of(title: str) -> str:
    """What the chart called `title` counts, where its name says so; else empty."""
    return UNITS.get(title, "seconds" if is_duration(title) else "")


@dataclass
class Series:
    """One curve, split into what can be drawn and the steps where the value was NaN or infinite."""

    metric: str
    steps: list[int]
    values: list[float]
    left_out: list[int]

    @classmethod
    def of(cls, metric: str, curve: Mapping[str, Sequence]) -> Series:
        pairs = list(zip(curve["step"], curve["value"], strict=True))
        good = [(s, v) for s, v in pairs if v is not None and math.isfinite(v) and abs(v) < LARGEST]
        scale = 100 if is_share(metric) else 1
        kept = {step for step, _ in good}
        return cls(metric, [s for s, _ in good], [v * scale for _, v in good], [s for s, _ in pairs if s not in kept])

    @property
    def window(self) -> int:
        """Points in the smoothing window; 0 where the curve is short enough to be read raw."""
        planned = self.metric.startswith("learning_rate")  # a schedule has no noise, only corners to blur
        return 0 if planned or len(self.values) < SMOOTH_FROM else max(5, len(self.values) // 20) | 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean: unlike a running one it does not lag. At the ends it takes the half that exists."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        first, last = max(0, place - window // 2), min(len(values), place + window // 2 + 1)
        means.append((sums[last] - sums[first]) / (last - first))
    return means


@dataclass
class Axis:
    """One axis: its range, its round ticks, and the power of ten that their labels are divided by."""

    low: float
    high: float
    ticks: list[float]
    step: float
    exponent: int = 0

    @classmethod
    def over(cls, values: Sequence[float], *, whole: bool = False, share: bool = False) -> Axis:
        """The axis that shows `values`; `whole` for steps (integers, no margin), `share` for percentages."""
        low, high = min(values), max(values)
        if share and low >= 0 and high <= 100:
            # A share that is rare all along, as that of clipped ratios, would lie flat on the floor.
            low, high = 0.0, high if 0 < high < RARE else 100.0
        elif not whole and low > 0 and low < 0.4 * high:
            low = 0.0
        size = max(abs(low), abs(high))
        if high - low <= 1e-9 * size or size < 1e-100:
            margin = 1.0 if whole or size < 1e-100 else 0.1 * size
            low, high = low - margin, high + margin
        step = _round_step((high - low) / 5)
        if whole:
            step = max(1.0, step)
        else:
            low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        size = max(abs(low), abs(high))
        exponent = 0 if whole or 0.01 <= size < 1e5 else math.floor(math.log10(size))
        return cls(low, high, [place * step for place in range(first, last + 1)], step, exponent)

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        unit = 10.0**self.exponent
        digits = max(0, -math.floor(math.log10(self.step / unit) + 1e-9))
        return f"{tick / unit:,.{digits}f}"


def _round_step(raw: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))


def chart(title: str, curves: Curves, metrics: Sequence[str], unit: str = "") -> str:
    """One chart as an HTML figure: heading, legend, SVG, what was left out, and the numbers to unfold.

    Args:
        title: the name of the group, e.g. `loss`.
        curves: as from `curves_from_log`.
        metrics: the curves to draw.
        unit: what the vertical axis counts, e.g. `nats per token`; percentages say so by themselves.
    """
    series = [Series.of(metric, curves[metric]) for metric in metrics]
    heading = f"<h3>{escape(readable(title[:1].upper() + title[1:]))}</h3>"
    svg = _svg(title, series, unit) if any(one.values for one in series) else '<p class="muted">no finite value</p>'
    left_out = [
        f'<p class="warn">⚠ {escape(readable(one.metric))}: {len(one.left_out)} '
        f"{'value was' if len(one.left_out) == 1 else 'values were'} NaN or infinite and left out "
        f"(first at step {one.left_out[0]:,})</p>"
        for one in series
        if one.left_out
    ]
    notes = "".join(left_out)
    return f'<figure class="card">{heading}{_legend(series)}{svg}{notes}{_numbers(series, curves)}</figure>'


def _legend(series: Sequence[Series]) -> str:
    items = []
    for place, one in enumerate(series):
        mean = f' <span class="muted">(bold: mean of {one.window} points)</span>' if one.window else ""
        items.append(
            f'<li><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line {_looks(place)}" '
            f'd="M1 4H21"/></svg>{escape(readable(one.metric))}{mean}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _looks(place: int) -> str:
    # The dash pattern changes with the colour, so that the lines can be told apart without colours.
    return f"c{place % COLOURS} d{place % 4}"


def _svg(title: str, series: Sequence[Series], unit: str) -> str:
    across = Axis.over([step for one in series for step in [*one.steps, *one.left_out]], whole=True)
    share = all(is_share(one.metric) for one in series)
    upward = Axis.over([value for one in series for value in one.values], share=share)
    power = f"×10{str(upward.exponent).translate(SUPERSCRIPT)}" if upward.exponent else ""
    label = " ".join(part for part in (unit or ("%" if share else ""), power) if part) or readable(title)
    drawn = "".join(_lines(place, one, across, upward) for place, one in enumerate(series))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(readable(title))} by step">'
        f"{_axes(across, upward, label)}{drawn}</svg>"
    )


def _x(axis: Axis, step: float) -> float:
    return round(LEFT + axis.place(step) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _axes(across: Axis, upward: Axis, label: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in upward.ticks:
        y = _y(upward, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{upward.label(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    for tick in across.ticks:
        x = _x(across, tick)
        parts.append(f'<path class="axis" d="M{x} {floor}v4"/>')
        parts.append(f'<text x="{x}" y="{floor + 17}" text-anchor="middle">{across.label(tick)}</text>')
    parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    parts.append(f'<text class="name" x="4" y="13">{escape(label)}</text>')
    return "".join(parts)


def _lines(place: int, one: Series, across: Axis, upward: Axis) -> str:
    points = [(_x(across, s), _y(upward, v)) for s, v in zip(one.steps, one.values, strict=True)]
    looks, parts = _looks(place), []
    if one.window:
        parts.append(f'<path class="line raw {looks}" d="{_path(points)}"/>')
        means = [_y(upward, value) for value in smooth(one.values, one.window)]
        points = list(zip([x for x, _ in points], means, strict=True))
    parts.append(f'<path class="line {looks}" d="{_path(points)}"/>')
    if len(points) <= MARKERS_UP_TO:
        scale = 100 if is_share(one.metric) else 1
        for (x, y), step, value in zip(points, one.steps, one.values, strict=True):
            text = f"{readable(one.metric)}, step {step:,}: {format_metric(one.metric, value / scale)}"
            parts.append(f'<circle class="{looks}" cx="{x}" cy="{y}" r="2.6"><title>{escape(text)}</title></circle>')
    for step in one.left_out[:MARKERS_UP_TO]:
        parts.append(
            f'<path class="lost" d="M{_x(across, step) - 3:.1f} {HEIGHT - BOTTOM - 3}l6 6m0 -6l-6 6">'
            f"<title>{escape(readable(one.metric))}, step {step:,}: NaN or infinite</title></path>"
        )
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in _thinned(points)) if points else ""


def _thinned(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """At most a few points a pixel column: first, lowest, highest and last of each, so that spikes stay."""
    if len(points) <= 2 * WIDTH:
        yield from points
        return
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    for column in columns.values():
        lowest, highest = min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])
        yield from sorted(dict.fromkeys([column[0], lowest, highest, column[-1]]))


def _numbers(series: Sequence[Series], curves: Curves) -> str:
    rows = sorted({step for one in series for step in curves[one.metric]["step"]})
    shown = rows
    if len(rows) > TABLE_ROWS:
        even = {rows[round(place * (len(rows) - 1) / (TABLE_ROWS - 1))] for place in range(TABLE_ROWS)}
        # A curve of few points, like that of an evaluation, is shown whole beside a dense one.
        sparse = (curves[one.metric]["step"] for one in series if len(curves[one.metric]["step"]) <= TABLE_ROWS)
        shown = sorted(even.union(*sparse))
    known = [dict(zip(curves[one.metric]["step"], curves[one.metric]["value"], strict=True)) for one in series]
    head = "".join(f'<th scope="col">{escape(readable(one.metric))}</th>' for one in series)
    body = []
    for step in shown:
        cells = (
            format_metric(one.metric, at[step]) if step in at else "" for one, at in zip(series, known, strict=True)
        )
        body.append(f'<tr><th scope="row">{step:,}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    note = f" ({len(shown)} of {len(rows):,} steps; all of them in report.json)" if len(shown) < len(rows) else ""
    return (
        f'<details><summary>Numbers{note}</summary><div class="scroll"><table class="figures"><thead><tr>'
        f'<th scope="col">step</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div></details>'
    )
