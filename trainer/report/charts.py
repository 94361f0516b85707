"""What a chart shows, apart from how it is drawn: the page draws it with its script, `draw` as a
picture. Makers take runs, or lines of a run, and give None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.report.colours import SCALE, SFT_NAME
from trainer.report.runs import SFT, Run
from trainer.runs.names import file_name

MOST = 12
"""Domains that get a chart, or a row in one, each; the table has them all."""

Kind = Literal["line", "path", "bars", "histogram", "heat"]


@dataclass(kw_only=True)
class Series:
    """One curve, one colour of bars, one outline."""

    label: str
    colour: str
    """A name of `colours`."""
    x: list[float] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)
    run: str = ""
    """The run whose it is: they are switched on and off together."""
    style: Literal["smooth", "dots", "level"] = "dots"
    """A moving mean over the pale raw curve; a dot for each value; a line across at y[0]."""
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)


@dataclass(kw_only=True)
class Chart:
    name: str
    """File name of the plot."""
    title: str
    kind: Kind
    caption: str = ""
    """What to look for."""
    x: str = ""
    y: str = ""
    series: list[Series] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    """Of bars and of a heat map, whose columns are its series."""


def points(lines: Iterable[dict[str, Any]], key: str) -> tuple[list[float], list[float | None]]:
    some = [(line["step"], value) for line in lines if (value := line.get(key)) is not None]
    return [step for step, _ in some], [value for _, value in some]


def over_evaluations(runs: list[Run], key: str, title: str, caption: str = "") -> Chart | None:
    """A line for each run; the SFT model is where they start and a dashed line across."""
    curves = []
    for run in runs:
        x, y = points(run.evaluations, key)
        if y:
            curves.append(Series(label=run.name, run=run.name, colour=run.colour, x=x, y=y))
    if all(len(curve.y) < 2 for curve in curves):
        return None
    sft = next((run.sft[key] for run in runs if run.sft and run.sft.get(key) is not None), None)
    level = [Series(label=SFT, colour=SFT_NAME, y=[sft], style="level")] if sft is not None else []
    return Chart(
        name=file_name(key), title=title, kind="line", caption=caption, x="PPO step",
        series=level + curves,
    )  # fmt: skip


def bars(
    runs: list[Run], names: Sequence[str], prefix: str, metric: str, title: str, caption: str
) -> Chart | None:
    """A bar for the SFT model and for each run, by domain, with 95 % intervals where they are
    logged: at the last evaluation."""
    sft = next((run.sft for run in runs if run.sft), None)
    columns = [(SFT, "", SFT_NAME, sft)]
    columns += [(run.name, run.name, run.colour, run.final) for run in runs]
    known = [(label, run, colour, line) for label, run, colour, line in columns if line]
    names = [name for name in names if any(f"{prefix}/{name}/{metric}" in x[3] for x in known)]
    if not known or not names:
        return None
    keys = [f"{prefix}/{name}/{metric}" for name in names]
    series = [
        Series(
            label=label,
            run=run,
            colour=colour,
            y=[line.get(key) for key in keys],
            low=[line.get(f"{key}_low") for key in keys],
            high=[line.get(f"{key}_high") for key in keys],
        )
        for label, run, colour, line in known
    ]
    name = f"bars_{file_name(prefix)}_{file_name(metric)}"
    return Chart(
        name=name, title=title, kind="bars", caption=caption, x="share of prompts",
        series=series, rows=list(names),
    )  # fmt: skip


def paths(
    runs: list[Run], x: str, y: str, title: str, labels: tuple[str, str], caption: str
) -> Chart | None:
    """The way each run takes through a plane, evaluation by evaluation; a dot where it ends."""
    series = []
    for run in runs:
        places = [(e[x], e[y]) for e in run.evaluations if None not in (e.get(x), e.get(y))]
        if len(places) > 1:
            xs, ys = zip(*places)
            way = Series(label=run.name, run=run.name, colour=run.colour, x=list(xs), y=list(ys))
            series.append(way)
    if not series:
        return None
    name = f"{file_name(y)}_by_{file_name(x)}"
    return Chart(
        name=name, title=title, kind="path", caption=caption, x=labels[0], y=labels[1],
        series=series,
    )  # fmt: skip


def over_steps(
    run: Run,
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str = "",
    x: str = "step",
    style: Literal["smooth", "dots"] = "smooth",
    least: int = 2,
) -> Chart | None:
    """keys: metric -> (label, colour); of one run."""
    series = []
    for key, (label, colour) in keys.items():
        steps, values = points(lines, key)
        if len(values) >= least:
            series.append(
                Series(label=label, run=run.name, colour=colour, x=steps, y=values, style=style)
            )
    if not series:
        return None
    return Chart(name=name, title=title, kind="line", caption=caption, x=x, series=series)


def runs_over_steps(
    runs: list[Run], stage: str, key: str, title: str, caption: str = ""
) -> Chart | None:
    """One metric of training for every run that logs it."""
    series = []
    for run in runs:
        x, y = points(run.stage(stage), key)
        if len(y) > 1:
            series.append(
                Series(label=run.name, run=run.name, colour=run.colour, x=x, y=y, style="smooth")
            )
    if not series:
        return None
    x_label = "PPO step" if stage in ("ppo", "eval") else f"{stage} step"
    name = f"{file_name(stage)}_{file_name(key)}"
    return Chart(name=name, title=title, kind="line", caption=caption, x=x_label, series=series)


def histogram(
    values: dict[str, tuple[list[float], str, str]],
    title: str,
    x: str,
    name: str,
    caption: str = "",
) -> Chart | None:
    """values: label -> (numbers, colour, run); outlines, as shares, over common bins."""
    values = {label: each for label, each in values.items() if len(each[0]) > 1}
    everything = [number for numbers, *_ in values.values() for number in numbers]
    if not everything or min(everything) == max(everything):
        return None
    low, bins = min(everything), 24
    width = (max(everything) - low) / bins
    edges = [low + width * i for i in range(bins + 1)]
    series = []
    for label, (numbers, colour, run) in values.items():
        counts = [0] * bins
        for number in numbers:
            counts[min(bins - 1, int((number - low) / width))] += 1
        shares: list[float | None] = [count / len(numbers) for count in counts]
        series.append(Series(label=label, run=run, colour=colour, x=edges, y=shares))
    return Chart(
        name=name, title=title, kind="histogram", caption=caption, x=x, y="share", series=series
    )


def contingency(run: Run) -> Chart | None:
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
    whole = {name: max(1, sum(cells.get((group, name), 0) for group in groups)) for name in domains}
    columns = [
        Series(
            label=group_label(group, groups),
            run=run.name,
            colour=run.colour,
            y=[cells.get((group, name), 0) / whole[name] for name in domains],
        )
        for group in groups
    ]
    caption = (
        f"{run.name}: where the head puts each domain's evaluation prompts. It never saw the "
        "domains; a hard domain should lie to the left."
    )
    return Chart(
        name=f"contingency_{file_name(run.name)}", title="Group against true domain", kind="heat",
        caption=caption, series=columns, rows=domains,
    )  # fmt: skip


def timing(run: Run) -> Chart | None:
    lines = run.stage("ppo")
    phases = dict.fromkeys(
        key for line in lines for key in line if key.startswith("timing/") and line[key]
    )
    means = {key: sum(line.get(key) or 0 for line in lines) / len(lines) for key in phases}
    if not means:
        return None
    ordered = sorted(means, key=lambda key: -means[key])
    seconds: list[float | None] = [means[key] for key in ordered]
    return Chart(
        name=f"timing_{file_name(run.name)}", title="Where a PPO step spends its time", kind="bars",
        caption=run.name, x="seconds, mean", rows=[key.split("/", 1)[1] for key in ordered],
        series=[Series(label=run.name, run=run.name, colour=run.colour, y=seconds)],
    )  # fmt: skip


def group_label(group: str, groups: Sequence[str]) -> str:
    hint = {groups[0]: " (hardest)", groups[-1]: " (easiest)"}
    return f"group {group}{hint.get(group, '')}"


def shade(i: int) -> str:
    return SCALE[i % len(SCALE)]
