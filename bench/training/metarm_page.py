"""What came out of MetaRM's study: the page and the plot, and the intervals that they show."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.evidence.stats import interpolate, interval
from trainer.report import STYLE


def column(rows: list[dict], variant: str, n: int, key: str) -> dict[int, float]:
    """Seed -> value."""
    return {
        row["seed"]: row[key]
        for row in rows
        if row["variant"] == variant and row["round"] == n and row.get(key) is not None
    }


def against_control(rows: list[dict], variant: str, n: int, key: str) -> list[float]:
    ours, control = (column(rows, name, n, key) for name in (variant, "none"))
    return [ours[seed] - control[seed] for seed in sorted(ours.keys() & control.keys())]


def change(rows: list[dict], variant: str, n: int, key: str) -> list[float]:
    """From the round before, seed by seed."""
    old, new = (column(rows, variant, each, key) for each in (n - 1, n))
    return [new[seed] - old[seed] for seed in sorted(new.keys() & old.keys())]


def means(rows: list[dict], variant: str, rounds: range, key: str) -> dict[int, float]:
    """Seed -> mean over the rounds, of each seed that has them all."""
    columns = [column(rows, variant, n, key) for n in rounds]
    seeds = set.intersection(*map(set, columns))
    return {seed: statistics.mean(each[seed] for each in columns) for seed in seeds}


def over_rounds(rows: list[dict], variant: str, rounds: range, key: str) -> list[float]:
    """Mean over the rounds less the control's."""
    if variant == "none":
        return []
    ours, control = (means(rows, name, rounds, key) for name in (variant, "none"))
    return [ours[seed] - control[seed] for seed in sorted(ours.keys() & control.keys())]


def at_equal_kl(results: dict, variant: str, rounds: range) -> list[float]:
    """Seed by seed: mean gold over the rounds less the control's curve of gold over KL, at the
    variant's own mean KL. The curve is straight between the control's coefficients and goes on
    level at its ends."""
    controls = ["none", *results["controls"]]
    names = {variant, *controls}
    gold, kl = (
        {name: means(results["rows"], name, rounds, f"policy/{key}") for name in names}
        for key in ("gold", "kl")
    )

    def above_curve(seed: int) -> float:
        xs, ys = ([each[name][seed] for name in controls] for each in (kl, gold))
        return gold[variant][seed] - interpolate(kl[variant][seed], xs, ys)

    return list(
        map(above_curve, sorted(set.intersection(*map(set, (*gold.values(), *kl.values())))))
    )


REWARD_MODEL = (
    ("spread", "relative spread"),
    ("taste_accuracy", "accuracy by taste"),
    ("gold_accuracy", "accuracy by gold"),
    ("pair_accuracy", "held-out pairs"),
    ("objective", "J"),
)
POLICY = (
    ("policy/gold", "gold"),
    ("policy/proxy", "proxy"),
    ("policy/kl", "KL"),
    ("policy/distinct", "distinct answers"),
)


GOLD = (
    "Change from one round to the next, and 95 % over seeds; last, the mean over the rounds less "
    "the control's. `literal` takes a detour so short that it is a second control: what lies "
    "between it and `none` is chance, for PPO enlarges any difference."
)
EQUAL_KL = (
    "Gold less that of the control's curve at the variant's own KL, seed by seed: the control ran "
    "at other KL coefficients, too. Straight between its points, level beyond its ends."
)


def markdown(results: dict) -> str:
    rows, variants = results["rows"], results["variants"]
    rounds = range(1, results["rounds"] + 1)
    lines = [
        "# MetaRM on the toy world",
        "",
        f"{len(results['seeds'])} seeds ({', '.join(map(str, results['seeds']))}), "
        f"{results['rounds']} rounds. `python -m bench.training.metarm` repeats it; its first "
        "lines say what the columns mean. In brackets: 95 % of the difference to `none` of the "
        "same seed, Student's over seeds.",
        "",
        "## Reward model, on answers of the policy as it is at the start of the round",
        "",
        "The first line of a round is the control's reward model before the round.",
        "",
    ]
    lines += _head(["round", "variant", *(title for _, title in REWARD_MODEL)])
    for n in rounds:
        before = [_cell(rows, "none", n, f"before/{key}") for key, _ in REWARD_MODEL]
        lines.append(_row([str(n), "before", *before]))
        for variant in variants:
            cells = [_cell(rows, variant, n, f"after/{key}") for key, _ in REWARD_MODEL]
            lines.append(_row([str(n), variant, *cells]))
    lines += ["", "## Policy after the round's PPO", ""]
    lines += _head(["round", "variant", *(title for _, title in POLICY)])
    start = [_cell(rows, "none", 0, key) for key, _ in POLICY]
    lines.append(_row(["0", "all", *start]))
    for n in rounds:
        for variant in variants:
            cells = [_cell(rows, variant, n, key) for key, _ in POLICY]
            lines.append(_row([str(n), variant, *cells]))
    lines += ["", "## Gold", "", GOLD, ""]
    lines += _head(["variant", *(f"{n - 1} to {n}" for n in rounds), "over the rounds"])
    for variant in variants:
        gains = [change(rows, variant, n, "policy/gold") for n in rounds]
        gains.append(over_rounds(rows, variant, rounds, "policy/gold"))
        lines.append(_row([variant, *(_interval(gain) if gain else "" for gain in gains)]))
    if results["controls"]:
        lines += ["", "## Gold at equal KL", "", EQUAL_KL, ""]
        lines += _head(["control", *(f"KL, gold after {n}" for n in rounds)])
        for name in ("none", *results["controls"]):
            pairs = [
                [_mean(rows, name, n, key) for key in ("policy/kl", "policy/gold")] for n in rounds
            ]
            lines.append(_row([name, *(", ".join(pair) for pair in pairs)]))
        lines.append("")
        lines += _head(["variant", *(f"after {n}" for n in rounds), "over the rounds"])
        for variant in variants[1:]:
            spans = [*(range(n, n + 1) for n in rounds), rounds]
            cells = [_interval(at_equal_kl(results, variant, span)) for span in spans]
            lines.append(_row([variant, *cells]))
    return "\n".join(lines) + "\n"


def _head(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(rows: list[dict], variant: str, n: int, key: str) -> str:
    """The mean; and of what is not the control, the interval of its difference to it."""
    values = column(rows, variant, n, key)
    if not values:
        return ""
    text = _mean(rows, variant, n, key)
    if variant != "none" and (differences := against_control(rows, variant, n, key)):
        seen = interval(differences)
        text += f" [{seen.low:+.3f}, {seen.high:+.3f}]"
    return text


def _mean(rows: list[dict], variant: str, n: int, key: str) -> str:
    return f"{statistics.mean(column(rows, variant, n, key).values()):.3f}"


def _interval(values: list[float]) -> str:
    seen = interval(values)
    return f"{seen.mean:+.3f} [{seen.low:+.3f}, {seen.high:+.3f}]"


COLOURS = ("#7d8597", "#b08900", "#2e6f95", "#8e6c8a", "#c8553d", "#588157")


def plot(results: dict, path: Path) -> None:
    panels = (
        ("after/spread", "Relative spread on the policy's answers"),
        ("after/taste_accuracy", "Accuracy there, by annotators' taste"),
        ("after/gold_accuracy", "Accuracy there, by gold"),
        ("policy/gold", "Policy's gold after the round"),
        ("policy/proxy", "Policy's proxy, by the round's model"),
        ("policy/kl", "Policy's KL from SFT, nats"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.2))
        for axes, (key, title) in zip(figure.subplots(2, 3).flat, panels):
            for i, variant in enumerate(results["variants"]):
                points = []
                for n in range(results["rounds"] + 1):
                    values = list(column(results["rows"], variant, n, key).values())
                    if values:
                        seen = interval(values)
                        points.append((n, seen.mean, seen.low, seen.high))
                xs, means, lows, highs = zip(*points)
                colour = COLOURS[i % len(COLOURS)]
                dodge = [x + 0.05 * (i - len(results["variants"]) / 2) for x in xs]
                axes.plot(dodge, means, color=colour, marker="o", markersize=4, label=variant)
                axes.vlines(dodge, lows, highs, color=colour, linewidth=1, alpha=0.6)
            axes.set_title(title)
            axes.set_xticks(range(results["rounds"] + 1))
            axes.set_xlabel("round")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, format="png", dpi=130)
