"""A chart as a picture: one small figure each, so that a phone shows them one under another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.report.charts import Chart, Kind, Series
from trainer.report.colours import ON_WHITE, SFT_COLOUR
from trainer.runs.names import in_plot

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#555",
    "axes.edgecolor": "#bbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eee",
    "axes.axisbelow": True,
    "xtick.color": "#555",
    "ytick.color": "#555",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a domain may be called $x$
}


def pictures(charts: list[Chart], folder: Path) -> None:
    """<folder>/<name>.png of each."""
    with matplotlib.rc_context(STYLE):
        for chart in charts:
            figure(chart).savefig(folder / f"{chart.name}.png", format="png", dpi=150)


def figure(chart: Chart) -> Figure:
    drawn = Figure(figsize=(4.4, 3.0))
    axes = drawn.add_subplot()
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.set_title(in_plot(chart.title), pad=8)
    _KINDS[chart.kind](chart, axes)
    if chart.kind != "heat" and len(chart.series) > 1:
        _legend(axes)
    return drawn


def smooth(values: list[float | None]) -> list[float]:
    """Centred moving mean over about a tenth of the curve, shorter at the ends."""
    numbers = [float(value or 0) for value in values]
    half = len(numbers) // 20
    windows = (numbers[max(0, i - half) : i + half + 1] for i in range(len(numbers)))
    return [sum(window) / len(window) for window in windows]


def _line(chart: Chart, axes: Axes) -> None:
    for each in chart.series:
        colour = ON_WHITE[each.colour]
        if each.style == "level":
            level = float(each.y[0] or 0)
            axes.axhline(level, color=colour, linestyle="--", linewidth=1, label=each.label)
        elif each.style == "smooth":
            axes.plot(each.x, each.y, color=colour, alpha=0.22, linewidth=0.8)  # type: ignore[arg-type]
            axes.plot(each.x, smooth(each.y), color=colour, label=each.label)
        else:
            axes.plot(each.x, each.y, color=colour, marker="o", markersize=3, label=each.label)  # type: ignore[arg-type]


def _path(chart: Chart, axes: Axes) -> None:
    for each in chart.series:
        colour, ys = ON_WHITE[each.colour], [float(y or 0) for y in each.y]
        axes.plot(each.x, ys, color=colour, linewidth=1.3, alpha=0.8)
        axes.scatter(each.x[:-1], ys[:-1], color=colour, s=10)
        axes.scatter(each.x[-1:], ys[-1:], color=colour, s=55, label=each.label, zorder=3)
        axes.scatter(each.x[:1], ys[:1], color="white", edgecolor=SFT_COLOUR, s=40, zorder=3)


def _bars(chart: Chart, axes: Axes) -> None:
    count = len(chart.series)
    axes.figure.set_size_inches(4.4, 1.1 + len(chart.rows) * (0.12 + 0.16 * count))  # type: ignore[union-attr]
    height = 0.8 / count
    for i, each in enumerate(chart.series):
        values = [float(y or 0) for y in each.y]
        places = [row + (i - (count - 1) / 2) * height for row in range(len(values))]
        axes.barh(
            places, values, height * 0.92, xerr=_errors(each, values) if each.low else None,
            color=ON_WHITE[each.colour], label=each.label, alpha=0.9,
            error_kw={"elinewidth": 0.8, "ecolor": "#444"},
        )  # fmt: skip
    axes.set_yticks(range(len(chart.rows)), [in_plot(name) for name in chart.rows])
    axes.invert_yaxis()
    if chart.x.startswith("share"):
        axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")


def _errors(each: Series, values: list[float]) -> list[list[float]]:
    """From the value down and up."""
    return [
        [0 if end is None else max(0.0, y - end) for y, end in zip(values, each.low)],
        [0 if end is None else max(0.0, end - y) for y, end in zip(values, each.high)],
    ]


def _histogram(chart: Chart, axes: Axes) -> None:
    for each in chart.series:
        colour, shares = ON_WHITE[each.colour], [float(y or 0) for y in each.y]
        axes.stairs(shares, each.x, fill=True, color=colour, alpha=0.12)
        axes.stairs(shares, each.x, color=colour, label=each.label, linewidth=1.4)


def _heat(chart: Chart, axes: Axes) -> None:
    shares = [
        [float(column.y[row] or 0) for column in chart.series] for row in range(len(chart.rows))
    ]
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(chart.series)), [column.label for column in chart.series])
    axes.set_yticks(range(len(chart.rows)), [in_plot(name) for name in chart.rows])
    axes.grid(visible=False)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            shade = "white" if share > 0.55 else "#333"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=shade)


def _legend(axes: Axes) -> None:
    """Under the axes, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [in_plot(each) for each in labels]
    columns = 2 if len(labels) < 5 else 3
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


_KINDS: dict[Kind, Callable[[Chart, Axes], None]] = {
    "line": _line, "path": _path, "bars": _bars, "histogram": _histogram, "heat": _heat,
}  # fmt: skip
