"""What the runs of a benchmark reached: mean and spread over seeds, as figures, a table and a picture.

All of it is read from the run reports. The spread is the sample standard deviation; of a single seed there is none.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_runs import Run

from shared.errors import UserError
from shared.runtime.report_text import MISSING, format_metric, format_number, is_share, readable

SUFFIXES = (".png", ".pdf", ".svg")
USUAL = ("eval_reward", "reward", "eval_loss", "loss")  # what is drawn where nobody says


def summary(label: str, words: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of one command reached, of those that are finished."""
    reports = {run.seed: run.report() for run in runs if run.finished}
    return {
        "label": label,
        "command": list(words),
        "seeds": list(reports),
        "runs": [
            {"seed": run.seed, "folder": str(run.folder), "finished": run.seed in reports,
             "seconds": run.record().get("seconds")}
            for run in runs
        ],
        "before": _figures([report.get("before", {}) for report in reports.values()]),
        "after": _figures([report.get("after", {}) for report in reports.values()]),
        "curves": _curves([report.get("curves", {}) for report in reports.values()]),
    }  # fmt: skip


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _figures(measured: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Metric -> mean, std and the values of the seeds that have one."""
    figures = {}
    for name in dict.fromkeys(name for each in measured for name in each):
        values = [each[name] for each in measured if each.get(name) is not None]
        if values:
            figures[name] = {"mean": statistics.mean(values), "std": _spread(values), "values": values}
    return figures


def _curves(curves: Sequence[Mapping[str, Mapping[str, list]]]) -> dict[str, dict[str, list]]:
    """Metric -> steps with mean and std over the seeds, of the metrics and steps that all seeds have.

    A mean over fewer seeds at the end, where one run was shorter, would jump for no reason of its own.
    """
    merged = {}
    for name in curves[0] if curves else ():
        if not all(name in each for each in curves):
            continue
        points = [
            {step: value for step, value in zip(each[name]["step"], each[name]["value"], strict=True) if _real(value)}
            for each in curves
        ]
        steps = sorted(set.intersection(*(set(each) for each in points)))
        columns = [[each[step] for each in points] for step in steps]
        if steps:
            merged[name] = {
                "step": steps,
                "mean": [statistics.mean(column) for column in columns],
                "std": [_spread(column) for column in columns],
            }
    return merged


def _real(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# ---- Which curve ----------------------------------------------------------------------------------------------------


def parse_metric_of(texts: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Label -> metric, of `label=metric`.

    Raises:
        UserError: it is not of that form, or there is no such label.
    """
    chosen = {}
    for text in texts:
        label, equals, metric = text.partition("=")
        if not equals or not metric or label not in labels:
            raise UserError(f"--metric-of {text}: give label=metric; the labels are {', '.join(labels)}.")
        chosen[label] = metric
    return chosen


def metrics_to_show(
    summaries: Sequence[Mapping[str, Any]], metric: str | None, metric_of: Mapping[str, str]
) -> dict[str, str]:
    """Label -> the metric whose curve is shown, of the commands that have finished runs.

    Args:
        summaries: as from `summary`.
        metric: of those that `metric_of` does not name; None: the first usual one that all of these have.
        metric_of: label -> metric.

    Raises:
        UserError: a command has no curve of that name.
    """
    done = [each for each in summaries if each["seeds"]]
    rest = [each for each in done if each["label"] not in metric_of]
    if metric is None and rest:
        metric = next((name for name in USUAL if all(name in each["curves"] for each in rest)), None)
        if metric is None:
            common = [name for name in rest[0]["curves"] if all(name in each["curves"] for each in rest)]
            raise UserError(f"Which --metric? These curves are in all runs: {', '.join(common) or 'none'}.")
    chosen = {each["label"]: metric_of.get(each["label"], metric) for each in done}
    for each in done:
        if (name := chosen[each["label"]]) not in each["curves"]:
            known = ", ".join(each["curves"]) or "none"
            raise UserError(f"--metric {name}: {each['label']} has no such curve. There are: {known}.")
    return chosen


# ---- Table and picture ----------------------------------------------------------------------------------------------


def mean_and_spread(metric: str, figure: Mapping[str, Any] | None) -> str:
    """`81.2 ± 1.4 %`, `0.5513 ± 0.012`; `-` where there is nothing."""
    if figure is None:
        return MISSING
    mean, spread = figure["mean"], figure["std"]
    if spread is None:
        return format_metric(metric, mean)
    if is_share(metric):
        return f"{100 * mean:.1f} ± {100 * spread:.1f} %"
    return f"{format_number(mean)} ± {format_number(float(f'{spread:.2g}'))}"


def table(summaries: Sequence[Mapping[str, Any]], shown: Mapping[str, str]) -> str:
    """Mean ± spread before and after training, for a terminal.

    Args:
        summaries: as from `summary`.
        shown: label -> a curve, whose first and last values are given too.
    """
    rows = [("command", "seeds", "what", "before", "after")]
    for each in summaries:
        label, seeds = each["label"], str(len(each["seeds"]))
        before, after = each["before"], each["after"]
        for name in dict.fromkeys([*before, *after]):
            cells = (mean_and_spread(name, side.get(name)) for side in (before, after))
            rows.append((label, seeds, name, *cells))
        if label in shown:
            name = shown[label]
            curve = each["curves"][name]
            ends = ({"mean": curve["mean"][at], "std": curve["std"][at]} for at in (0, -1))
            what = f"{name} (logged, steps {curve['step'][0]} and {curve['step'][-1]})"
            rows.append((label, seeds, what, *(mean_and_spread(name, end) for end in ends)))
        elif not before and not after:
            rows.append((label, seeds, "(nothing was measured)", MISSING, MISSING))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]

    def line(row: tuple[str, ...]) -> str:
        cells = zip(row, widths, (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust), strict=True)
        return "  ".join(adjust(cell, width) for cell, width, adjust in cells)

    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(["Mean ± standard deviation over seeds", *map(line, rows)])


def check_plot(path: str | None) -> None:
    """Say at the start, not after hours, that no picture can be drawn.

    Raises:
        UserError: matplotlib is missing, or the file's kind is unknown.
    """
    if path is None:
        return
    if Path(path).suffix not in SUFFIXES:
        raise UserError(f"--plot {path}: the name has to end with one of {', '.join(SUFFIXES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out.")


def plot(summaries: Sequence[Mapping[str, Any]], shown: Mapping[str, str], path: Path) -> None:
    """Draw the curves of all commands in one picture: the mean as a line, the spread as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    metrics = list(dict.fromkeys(shown.values()))
    percent = all(is_share(metric) for metric in metrics)
    scale = 100 if percent else 1
    for each in summaries:
        if each["label"] not in shown:
            continue
        metric, seeds = shown[each["label"]], len(each["seeds"])
        curve = each["curves"][metric]
        mean = [scale * value for value in curve["mean"]]
        what = f", {readable(metric)}" if len(metrics) > 1 else ""
        label = f"{each['label']}{what} ({seeds} seed{'s' if seeds > 1 else ''})"
        (line,) = axis.plot(curve["step"], mean, label=label, marker="o" if len(mean) == 1 else None)
        if seeds > 1:
            spread = [scale * value for value in curve["std"]]
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            axis.fill_between(curve["step"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel((readable(metrics[0]) if len(metrics) == 1 else "value") + (", %" if percent else ""))
    axis.set_title("mean ± standard deviation over seeds", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
