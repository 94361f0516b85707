"""The pictures of the page: curves, the frontier, differences arm by arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.evidence.blocks import Block
from bench.evidence.matrix import ARMS, SECTIONS, controls
from bench.evidence.measure import MEASURES, Runs, difference
from bench.evidence.stats import Interval
from trainer.report import RUN_COLOURS, SFT_COLOUR, STYLE


def plots(runs: Runs, target: Path) -> list[Block]:
    with matplotlib.rc_context(STYLE):
        made = {
            "evidence-curves.png": _curves(runs),
            "evidence-frontier.png": _frontier(runs),
            "evidence-pareto.png": _pareto(runs),
            "evidence-differences.png": _forest(runs),
        }
    captions = {
        "evidence-curves.png": "Gold during training, means over seeds; the band is the 95 % "
        "interval of the paired difference to PPO at equal mean coefficient, drawn about the "
        "method's curve: where PPO's curve leaves it, they differ.",
        "evidence-frontier.png": "The method against PPO's sweep of coefficients, means over "
        "the seeds that all of these have. PPO without a penalty and the paper's own recipe, far "
        "below, are left out: see the tables.",
        "evidence-pareto.png": "What the worst domain gains and what the easiest loses, over the "
        "run, means over the seeds that all of these have.",
        "evidence-differences.png": "Worst domain's gold over the run: each arm less its control. "
        "What lies beyond the edge is cut off there, with its mean in figures.",
    }
    blocks = []
    for name, figure in made.items():
        if figure is not None:
            figure.savefig(target / name, dpi=130)
            blocks += [Block("picture", name), Block("text", captions[name])]
    return blocks


CURVES = ("default", "ppo_equal", "one_coef", "no_drawing")


def _curves(runs: Runs) -> Figure | None:
    shown = [arm for arm in CURVES if arm in runs.records]
    if "default" not in shown:
        return None
    figure = Figure(figsize=(9.6, 3.6))
    for place, (key, title) in enumerate(
        (("eval/worst_domain_gold", "Worst domain's gold"), ("eval/gold", "Mean gold")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        axes.set_title(title)
        axes.set_xlabel("PPO step")
        for arm, colour in zip(shown, RUN_COLOURS):
            steps, means = _mean_curve(runs, arm, key)
            axes.plot(steps, means, color=colour, marker="o", markersize=3, label=ARMS[arm].title)
        band = _band(runs, key)
        if band is not None:
            axes.fill_between(*band, color=RUN_COLOURS[0], alpha=0.15, linewidth=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _mean_curve(runs: Runs, arm: str, key: str) -> tuple[list[float], list[float]]:
    curves = [{e["step"]: e[key] for e in r["evaluations"]} for r in runs.records[arm].values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def _band(runs: Runs, key: str) -> tuple[list[float], list[float], list[float]] | None:
    ours, theirs = runs.records["default"], runs.records.get("ppo_equal", {})
    if len(ours.keys() & theirs.keys()) < 2:
        return None

    def at(records: Mapping[int, dict], step: float) -> dict[int, float]:
        return {
            seed: line[key]
            for seed, record in records.items()
            for line in record["evaluations"]
            if line["step"] == step
        }

    steps, means = _mean_curve(runs, "default", key)
    halves = []
    for step in steps:
        seen = difference(at(ours, step), at(theirs, step))
        halves.append(seen.half if seen is not None else 0.0)
    low = [mean - half for mean, half in zip(means, halves)]
    return steps, low, [mean + half for mean, half in zip(means, halves)]


def _frontier(runs: Runs) -> Figure | None:
    sweep = runs.candidates("toy")
    if len(sweep) < 2 or "default" not in runs.figures:
        return None
    beside = {
        "default": RUN_COLOURS[0],
        "plus_weights": RUN_COLOURS[2],
        "one_coef": RUN_COLOURS[3],
        "soft": RUN_COLOURS[4],
        "sft": SFT_COLOUR,
    }
    beside = {arm: colour for arm, colour in beside.items() if arm in runs.figures}
    # Seeds differ by more than arms do: a mean over others would lie elsewhere for that alone.
    seeds = set.intersection(*(set(runs.figures[arm]) for arm in (*sweep, *beside)))
    if not seeds:
        return None

    figure = Figure(figsize=(9.6, 6.4))
    for place, (x, y) in enumerate(
        (
            ("coef", "worst_run"),
            ("coef", "gold_run"),
            ("kl_final", "worst_final"),
            ("kl_final", "gold_final"),
        ),
        1,
    ):
        axes = figure.add_subplot(2, 2, place)
        axes.set_xlabel(MEASURES[x].title)
        axes.set_title(MEASURES[y].title)
        points = sorted((runs.mean(arm, x, seeds), runs.mean(arm, y, seeds)) for arm in sweep)
        axes.plot(*zip(*points), color=RUN_COLOURS[1], marker="o", label="PPO, each coefficient")
        for arm, colour in beside.items():
            if (at := runs.mean(arm, x, seeds)) is not None:
                height = runs.mean(arm, y, seeds)
                axes.scatter([at], [height], color=colour, s=60, zorder=3, label=ARMS[arm].title)
    handles, labels = figure.axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


PARETO = ("default", "easiest", "one_coef", "variance", "gdro", "progress", "bandit", "signal")


def _pareto(runs: Runs) -> Figure | None:
    """Each arm at its worst and its easiest domain: up and to the right is better."""
    sweep = runs.candidates("toy")
    shown = [arm for arm in (*PARETO, "no_drawing", "sft") if arm in runs.figures]
    if len(sweep) < 2 or "default" not in shown:
        return None
    seeds = set.intersection(*(set(runs.figures[arm]) for arm in (*sweep, *shown)))
    if not seeds:
        return None
    figure = Figure(figsize=(9.6, 4.6))
    axes = figure.add_subplot()
    axes.set_xlabel(MEASURES["worst_run"].title)
    axes.set_ylabel(MEASURES["easiest_run"].title)

    def point(arm: str) -> tuple[float, float]:
        worst, easiest = (runs.mean(arm, name, seeds) for name in ("worst_run", "easiest_run"))
        assert worst is not None and easiest is not None
        return worst, easiest

    by_coefficient = sorted(sweep, key=lambda arm: runs.mean(arm, "coef", seeds) or 0)
    points = [point(arm) for arm in by_coefficient]
    axes.plot(*zip(*points), color=RUN_COLOURS[1], marker="o", label="PPO, each coefficient")
    for place, arm in enumerate(sorted(shown, key=lambda arm: -point(arm)[1])):
        colour = {"default": RUN_COLOURS[0], "sft": SFT_COLOUR}.get(arm, RUN_COLOURS[2])
        worst, easiest = point(arm)
        axes.scatter([worst], [easiest], color=colour, s=50, zorder=3)
        aside, side = (7, "left") if place % 2 == 0 else (-7, "right")
        axes.annotate(
            arm, (worst, easiest), xytext=(aside, -3), textcoords="offset points",
            ha=side, fontsize=8,
        )  # fmt: skip
    axes.legend(loc="best")
    return figure


EDGE = 0.25
"""How far the plot of differences goes to either side."""


def _forest(runs: Runs) -> Figure | None:
    rows: list[tuple[str, Interval]] = []
    taken = set()
    for section in SECTIONS.values():
        for arm in section.arms:
            control = section.control if arm != section.control else None
            if control is None and (equal := controls(section, section.arms)[1:]):
                control = equal[0]
            if control is None or {(arm, control), (control, arm)} & taken:
                continue
            seen = runs.paired(arm, control, "worst_run")
            if seen is not None and not math.isnan(seen.low) and ARMS[arm].kind == "ppo":
                taken.add((arm, control))
                rows.append((f"{ARMS[arm].title}  less  {control}", seen))
    if not rows:
        return None
    figure = Figure(figsize=(9.6, 0.8 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    places = range(len(rows), 0, -1)
    for place, (_, seen) in zip(places, rows):
        axes.plot([seen.low, seen.high], [place, place], color=RUN_COLOURS[1], linewidth=2)
        axes.scatter([seen.mean], [place], color=RUN_COLOURS[0], s=22, zorder=3)
        if abs(seen.mean) > EDGE:
            side = "left" if seen.mean < 0 else "right"
            edge = math.copysign(0.98 * EDGE, seen.mean)
            axes.text(edge, place, f"{seen.mean:+.2f}", ha=side, va="center", fontsize=8)
    axes.set_xlim(-EDGE, EDGE)
    axes.axvline(0, color="#999", linewidth=1)
    axes.set_yticks(list(places), [name for name, _ in rows])
    axes.grid(visible=False, axis="y")
    axes.set_ylim(0.3, len(rows) + 0.7)
    figure.suptitle("Worst domain's gold over the run, paired difference with 95 % interval")
    return figure
