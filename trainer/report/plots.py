"""The kinds of plot: one small figure each, so that a phone shows them one under another.

Each takes runs, or lines of a run, and gives None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.report.runs import SFT, SFT_COLOUR, Run
from trainer.runs.names import file_name, in_plot

MOST = 12
"""Domains that get a plot, or a row in one, each; the table has them all."""

# Groups and domains: the hardest first. Told apart in grey and by colour-blind readers too.
SCALE = ("#7b2d26", "#d08c60", "#4f8a8b", "#1f4e5f", "#a3b18a", "#9b5de5", "#f0a202", "#3a5a40")
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


@dataclass
class Panel:
    name: str
    """File name of the plot."""
    caption: str
    """What to look for."""
    figure: Figure


Point = tuple[list[float], list[float]]


def new_axes(title: str, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 3.0))
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(in_plot(title), pad=8)
    return figure, axes


def series(lines: Iterable[dict[str, Any]], key: str) -> Point:
    some = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in some], [value for _, value in some]


def smooth(values: list[float]) -> list[float]:
    """Centred moving mean over about a tenth of the curve, shorter at the ends."""
    half = len(values) // 20
    return [
        sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]


def over_evaluations(runs: list[Run], key: str, title: str, caption: str = "") -> Panel | None:
    """A line for each run; the SFT model is where they start and a dashed line across."""
    curves = [(run, *series(run.evaluations, key)) for run in runs]
    curves = [(run, steps, values) for run, steps, values in curves if values]
    if not curves or all(len(values) < 2 for _, _, values in curves):
        return None
    figure, axes = new_axes(title, "PPO step")
    sft = next((run.sft[key] for run in runs if run.sft and run.sft.get(key) is not None), None)
    if sft is not None:
        axes.axhline(sft, color=SFT_COLOUR, linestyle="--", linewidth=1, label=SFT)
    for run, steps, values in curves:
        axes.plot(steps, values, color=run.colour, marker="o", markersize=3, label=run.name)
    legend(axes)
    return Panel(file_name(key), caption, figure)


def bars(
    runs: list[Run], names: Sequence[str], prefix: str, metric: str, title: str, caption: str
) -> Panel | None:
    """A bar for the SFT model and for each run, by domain, with 95 % intervals where they are
    logged: at the last evaluation."""
    sft = next((run.sft for run in runs if run.sft), None)
    columns = [(SFT, SFT_COLOUR, sft)] + [(run.name, run.colour, run.final) for run in runs]
    known = [(name, colour, line) for name, colour, line in columns if line]
    names = [
        name for name in names if any(f"{prefix}/{name}/{metric}" in line for _, _, line in known)
    ]
    if not known or not names:
        return None
    figure, axes = new_axes(title, "share of prompts")
    figure.set_size_inches(4.4, 1.1 + len(names) * (0.12 + 0.16 * len(known)))
    height = 0.8 / len(known)
    for i, (label, colour, line) in enumerate(known):
        keys = [f"{prefix}/{name}/{metric}" for name in names]
        values = [line.get(key) or 0.0 for key in keys]
        ends = [(line.get(f"{key}_low"), line.get(f"{key}_high")) for key in keys]
        errors = [
            [0 if low is None else max(0.0, value - low) for value, (low, _) in zip(values, ends)],
            [
                0 if high is None else max(0.0, high - value)
                for value, (_, high) in zip(values, ends)
            ],
        ]
        places = [place + (i - (len(known) - 1) / 2) * height for place in range(len(names))]
        axes.barh(
            places, values, height * 0.92, xerr=errors, color=colour, label=label, alpha=0.9,
            error_kw={"elinewidth": 0.8, "ecolor": "#444"},
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    legend(axes)
    return Panel(f"bars_{file_name(prefix)}_{file_name(metric)}", caption, figure)


def paths(
    runs: list[Run], x: str, y: str, title: str, labels: tuple[str, str], caption: str
) -> Panel | None:
    """The way each run takes through a plane, evaluation by evaluation; a dot where it ends."""
    figure, axes = new_axes(title, *labels)
    drawn = False
    for run in runs:
        points = [(e[x], e[y]) for e in run.evaluations if None not in (e.get(x), e.get(y))]
        if len(points) < 2:
            continue
        drawn = True
        xs, ys = zip(*points)
        axes.plot(xs, ys, color=run.colour, linewidth=1.3, alpha=0.8)
        axes.scatter(xs[:-1], ys[:-1], color=run.colour, s=10)
        axes.scatter(xs[-1:], ys[-1:], color=run.colour, s=55, label=run.name, zorder=3)
        axes.scatter(xs[:1], ys[:1], color="white", edgecolor=SFT_COLOUR, s=40, zorder=3)
    if not drawn:
        return None
    legend(axes)
    return Panel(f"{file_name(y)}_by_{file_name(x)}", caption, figure)


def over_steps(
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str = "",
    x: str = "step",
) -> Panel | None:
    """keys: metric -> (label, colour). The curve is smoothed, the raw one lies pale behind it."""
    curves = [(label, colour, *series(lines, key)) for key, (label, colour) in keys.items()]
    curves = [curve for curve in curves if len(curve[3]) > 1]
    if not curves:
        return None
    figure, axes = new_axes(title, x)
    for label, colour, steps, values in curves:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=colour, label=label)
    if len(curves) > 1:
        legend(axes)
    return Panel(name, caption, figure)


def runs_over_steps(
    runs: list[Run], stage: str, key: str, title: str, caption: str = ""
) -> Panel | None:
    """One metric of training for every run that logs it."""
    figure, axes = new_axes(title, f"{stage} step")
    drawn = 0
    for run in runs:
        steps, values = series(run.stage(stage), key)
        if len(values) > 1:
            drawn += 1
            axes.plot(steps, values, color=run.colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, smooth(values), color=run.colour, label=run.name)
    if not drawn:
        return None
    if drawn > 1:
        legend(axes)
    return Panel(f"{stage}_{file_name(key)}", caption, figure)


def by_round(
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str,
    x: str = "round",
) -> Panel | None:
    """keys: metric -> (label, colour)."""
    curves = [(*each, *series(lines, key)) for key, each in keys.items()]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    figure, axes = new_axes(title, x)
    for label, colour, rounds, values in curves:
        axes.plot(rounds, values, color=colour, marker="o", markersize=4, label=label)
    axes.set_xticks([line["step"] for line in lines])
    if len(curves) > 1:
        legend(axes)
    return Panel(name, caption, figure)


def histogram(
    values: dict[str, tuple[list[float], str]], title: str, x: str, name: str, caption: str = ""
) -> Panel | None:
    """values: label -> (numbers, colour); outlines, as shares, over common bins."""
    values = {label: each for label, each in values.items() if len(each[0]) > 1}
    if not values:
        return None
    everything = [number for numbers, _ in values.values() for number in numbers]
    low, high = min(everything), max(everything)
    if low == high:
        return None
    figure, axes = new_axes(title, x, "share")
    bins = [low + (high - low) * i / 24 for i in range(25)]
    for label, (numbers, colour) in values.items():
        weights = [1 / len(numbers)] * len(numbers)
        axes.hist(numbers, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.12)
        axes.hist(numbers, bins, weights=weights, histtype="step", color=colour, label=label)
    legend(axes)
    return Panel(name, caption, figure)


def contingency(run: Run) -> Panel | None:
    """Share of each domain's evaluation prompts in each inferred group."""
    final = run.final or {}
    cells = {
        tuple(key.split("/", 2)[1:]): value
        for key, value in final.items()
        if key.startswith("contingency/") and key.count("/") > 1 and isinstance(value, int)
    }
    groups = run.groups
    domains = [name for name in run.domains if any(domain == name for _, domain in cells)]
    domains = domains[:MOST]
    if len(groups) < 2 or not domains:
        return None
    shares = []
    for domain in domains:
        counts = [cells.get((group, domain), 0) for group in groups]
        shares.append([count / max(1, sum(counts)) for count in counts])
    figure, axes = new_axes("Group against true domain")
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(groups)), [group_label(group, groups) for group in groups])
    axes.set_yticks(range(len(domains)), [in_plot(name) for name in domains])
    axes.grid(visible=False)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            shade = "white" if share > 0.55 else "#333"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=shade)
    caption = (
        f"{run.name}: where the head puts each domain's evaluation prompts. It never saw the "
        "domains; a hard domain should lie to the left."
    )
    return Panel(f"contingency_{file_name(run.name)}", caption, figure)


def timing(run: Run) -> Panel | None:
    lines = run.stage("ppo")
    phases = dict.fromkeys(
        key for line in lines for key in line if key.startswith("timing/") and line[key]
    )
    means = {key: sum(line.get(key) or 0 for line in lines) / len(lines) for key in phases}
    if not means:
        return None
    figure, axes = new_axes("Where a PPO step spends its time", "seconds, mean")
    ordered = sorted(means, key=lambda key: means[key])
    names = [key.split("/", 1)[1] for key in ordered]
    axes.barh(names, [means[key] for key in ordered], color=run.colour, alpha=0.85)
    axes.grid(visible=False, axis="y")
    return Panel(f"timing_{file_name(run.name)}", run.name, figure)


def legend(axes: Axes) -> None:
    """Under the axes, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [in_plot(each) for each in labels]
    axes.figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if len(labels) < 5 else 3
    )


def group_label(group: str, groups: Sequence[str]) -> str:
    hint = {groups[0]: " (hardest)", groups[-1]: " (easiest)"}
    return f"group {group}{hint.get(group, '')}"
