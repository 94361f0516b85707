"""report.html and plots/*.png of a run, or of several side by side.

The page carries its pictures inside and asks nothing of the network, so it can be mailed or
attached. It is made from metrics.jsonl, samples.jsonl and config.yaml alone; what a run has not
(yet) measured leaves no empty plot. Reading downward: `write`, the sections, the panels.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from trainer import config as settings

SFT = "SFT"
RUN_COLOURS = ("#c8553d", "#2e6f95", "#588157", "#8e6c8a", "#b08900", "#1b998b", "#5f4b8b")
SFT_COLOUR = "#7d8597"
# Groups and domains: the hardest first. Told apart in grey and by colour-blind readers too.
SCALE = ("#7b2d26", "#d08c60", "#4f8a8b", "#1f4e5f", "#a3b18a", "#9b5de5", "#f0a202", "#3a5a40")
STYLE = {
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
}


@dataclass
class Run:
    """What one run folder says."""

    name: str
    folder: Path
    colour: str
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("stage") == name]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """By step; the first is the SFT model, which is where the policy starts."""
        return sorted(self.stage("eval"), key=lambda line: line["step"])

    @property
    def sft(self) -> dict[str, Any] | None:
        return next((line for line in self.evaluations if line.get("policy") == "sft"), None)

    @property
    def final(self) -> dict[str, Any] | None:
        last = self.evaluations[-1] if self.evaluations else None
        return last if last and last.get("policy") != "sft" else None

    @property
    def domains(self) -> list[str]:
        keys = (self.final or self.sft or {}).keys()
        return list(dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("domain/")))

    @property
    def groups(self) -> list[str]:
        last = self.stage("ppo")[-1:] or [{}]
        names = {key.split("/")[1] for key in last[0] if key.startswith("group/")}
        groups = sorted((name for name in names if name.isdigit()), key=int)
        return groups if len(groups) > 1 else []

    @property
    def final_samples(self) -> list[dict[str, Any]]:
        evaluated = [line for line in self.samples if line.get("stage") == "eval"]
        last = max((line["step"] for line in evaluated), default=None)
        return [line for line in evaluated if line["step"] == last]


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """One folder: its report.html and plots/. Several: a comparison, in <first>/comparison/ or
    in `output`. Runs under <folder>/baselines/ are shown beside their own."""
    folders = [Path(folder) for folder in folders]
    runs = read_runs(folders)
    target = output or (folders[0] if len(folders) == 1 else folders[0] / "comparison")
    (target / "plots").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        sections = [
            _section(title, text, [panel for panel in panels(runs) if panel], target)
            for title, text, panels in SECTIONS
        ]
    title = "Run report" if len(folders) == 1 else "Comparison of runs"
    page = PAGE.format(
        title=escape(f"{title}: {', '.join(folder.resolve().name for folder in folders)}"),
        heading=escape(title),
        runs="".join(_legend_entry(run) for run in runs),
        tiles=_tiles(runs),
        table=_table(runs),
        differences=_differences(runs),
        sections="".join(sections),
        samples=_samples(runs),
        settings="".join(
            f"<details><summary>Settings of {escape(run.name)}</summary>"
            f"<pre>{escape(yaml.safe_dump(run.config, sort_keys=False))}</pre></details>"
            for run in runs
        ),
    )
    path = target / "report.html"
    aside = path.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def read_runs(folders: Sequence[Path]) -> list[Run]:
    names = _distinct([folder.resolve() for folder in folders])
    found: list[tuple[str, Path]] = []
    for name, folder in zip(names, folders):
        baselines = sorted(
            path for path in folder.glob("baselines/*") if (path / "metrics.jsonl").is_file()
        )
        alone = len(folders) == 1
        found.append((_what_it_is(folder) if alone else name, folder))
        found += [(path.name if alone else f"{name}: {path.name}", path) for path in baselines]
    return [
        Run(
            name=name,
            folder=folder,
            colour=RUN_COLOURS[i % len(RUN_COLOURS)],
            config=_read_config(folder),
            lines=_read_lines(folder / "metrics.jsonl"),
            samples=_read_lines(folder / "samples.jsonl"),
        )
        for i, (name, folder) in enumerate(found)
    ]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, 10):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _what_it_is(folder: Path) -> str:
    inference = _read_config(folder).get("groups", {}).get("inference")
    if inference is None:
        return folder.resolve().name
    return "PPO" if inference == "none" else "group-invariant PPO"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


# Panels: one small figure each, so that a phone shows them one under another.


@dataclass
class Panel:
    name: str
    """File name of the plot."""
    caption: str
    """What to look for."""
    figure: Figure


Point = tuple[list[float], list[float]]


def _new(title: str, x: str = "", y: str = "") -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.4, 3.0))
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, pad=8)
    return figure, axes


def _series(lines: Iterable[dict[str, Any]], key: str) -> Point:
    some = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in some], [value for _, value in some]


def _smooth(values: list[float]) -> list[float]:
    """Centred moving mean over about a tenth of the curve, shorter at the ends."""
    half = len(values) // 20
    return [
        sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]


def _over_evaluations(runs: list[Run], key: str, title: str, caption: str = "") -> Panel | None:
    """A line for each run; the SFT model is where they start and a dashed line across."""
    curves = [(run, *_series(run.evaluations, key)) for run in runs]
    curves = [(run, steps, values) for run, steps, values in curves if values]
    if not curves or all(len(values) < 2 for _, _, values in curves):
        return None
    figure, axes = _new(title, "PPO step")
    sft = next((run.sft[key] for run in runs if run.sft and run.sft.get(key) is not None), None)
    if sft is not None:
        axes.axhline(sft, color=SFT_COLOUR, linestyle="--", linewidth=1, label=SFT)
    for run, steps, values in curves:
        axes.plot(steps, values, color=run.colour, marker="o", markersize=3, label=run.name)
    _legend(axes)
    return Panel(_file(key), caption, figure)


def _paths(
    runs: list[Run], x: str, y: str, title: str, labels: tuple[str, str], caption: str
) -> Panel | None:
    """The way each run takes through a plane, evaluation by evaluation; a dot where it ends."""
    figure, axes = _new(title, *labels)
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
    _legend(axes)
    return Panel(f"{_file(y)}_by_{_file(x)}", caption, figure)


def _over_steps(
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str = "",
    x: str = "step",
) -> Panel | None:
    """keys: metric -> (label, colour). The curve is smoothed, the raw one lies pale behind it."""
    curves = [(label, colour, *_series(lines, key)) for key, (label, colour) in keys.items()]
    curves = [curve for curve in curves if len(curve[3]) > 1]
    if not curves:
        return None
    figure, axes = _new(title, x)
    for label, colour, steps, values in curves:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, label=label)
    if len(curves) > 1:
        _legend(axes)
    return Panel(name, caption, figure)


def _runs_over_steps(runs: list[Run], stage: str, key: str, title: str, caption: str = ""):
    """One metric of training for every run that logs it."""
    figure, axes = _new(title, f"{stage} step")
    drawn = 0
    for run in runs:
        steps, values = _series(run.stage(stage), key)
        if len(values) > 1:
            drawn += 1
            axes.plot(steps, values, color=run.colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=run.colour, label=run.name)
    if not drawn:
        return None
    if drawn > 1:
        _legend(axes)
    return Panel(f"{stage}_{_file(key)}", caption, figure)


def _histogram(
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
    figure, axes = _new(title, x, "share")
    bins = [low + (high - low) * i / 24 for i in range(25)]
    for label, (numbers, colour) in values.items():
        weights = [1 / len(numbers)] * len(numbers)
        axes.hist(numbers, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.12)
        axes.hist(numbers, bins, weights=weights, histtype="step", color=colour, label=label)
    _legend(axes)
    return Panel(name, caption, figure)


def _contingency(run: Run) -> Panel | None:
    """Share of each domain's evaluation prompts in each inferred group."""
    final = run.final or {}
    cells = {
        tuple(key.split("/")[1:]): value
        for key, value in final.items()
        if key.startswith("contingency/") and value is not None
    }
    groups = sorted({group for group, _ in cells}, key=int)
    domains = [name for name in run.domains if any(domain == name for _, domain in cells)]
    if len(groups) < 2 or not domains:
        return None
    shares = []
    for domain in domains:
        counts = [cells.get((group, domain), 0) for group in groups]
        shares.append([count / max(1, sum(counts)) for count in counts])
    figure, axes = _new("Group against true domain")
    axes.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(groups)), [_group(group, groups) for group in groups])
    axes.set_yticks(range(len(domains)), domains)
    axes.grid(visible=False)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            shade = "white" if share > 0.55 else "#333"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=shade)
    caption = (
        f"{run.name}: where the head puts each domain's evaluation prompts. It never saw the "
        "domains; a hard domain should lie to the left."
    )
    return Panel(f"contingency_{_file(run.name)}", caption, figure)


def _timing(run: Run) -> Panel | None:
    lines = run.stage("ppo")
    phases = dict.fromkeys(
        key for line in lines for key in line if key.startswith("timing/") and line[key]
    )
    means = {key: sum(line.get(key) or 0 for line in lines) / len(lines) for key in phases}
    if not means:
        return None
    figure, axes = _new("Where a PPO step spends its time", "seconds, mean")
    ordered = sorted(means, key=lambda key: means[key])
    names = [key.split("/", 1)[1] for key in ordered]
    axes.barh(names, [means[key] for key in ordered], color=run.colour, alpha=0.85)
    axes.grid(visible=False, axis="y")
    return Panel(f"timing_{_file(run.name)}", run.name, figure)


def _legend(axes) -> None:
    """Under the axes, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if len(labels) < 5 else 3
    )


def _group(group: str, groups: Sequence[str]) -> str:
    hint = {groups[0]: " (hardest)", groups[-1]: " (easiest)"}
    return f"group {group}{hint.get(group, '')}"


def _file(key: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in key).strip("_").lower()


# Sections: title, what the reader should know, and which panels.

Panels = list[Panel | None]


def _performance(runs: list[Run]) -> Panels:
    measure = "gold" if _has_gold(runs) else "score"
    best = "Gold" if measure == "gold" else "Proxy"
    mean = "eval/gold" if measure == "gold" else "eval/proxy"
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    return [
        _over_evaluations(
            runs,
            f"eval/worst_domain_{measure}",
            f"{best}, worst domain",
            "What the method is for.",
        ),
        _over_evaluations(runs, mean, f"{best}, mean over domains"),
        _over_evaluations(runs, "eval/gap", "Gap: best less worst domain", "Lower is more even."),
        *(
            _over_evaluations(runs, f"domain/{domain}/{measure}", f"{best}: {domain}")
            for domain in domains
        ),
        _over_evaluations(
            runs,
            f"eval/ood_{'gold' if measure == 'gold' else 'proxy'}",
            f"{best}, out of distribution",
            "Prompts that training never has.",
        ),
    ]


def _optimisation(runs: list[Run]) -> Panels:
    panels: Panels = [
        _over_evaluations(runs, "eval/proxy", "Proxy: what training sees"),
        _over_evaluations(runs, "eval/kl", "KL from the SFT model, nats a sequence"),
    ]
    if _has_gold(runs):
        panels += [
            _paths(
                runs,
                "eval/proxy",
                "eval/gold",
                "Proxy against gold",
                ("proxy", "gold"),
                "From the open circle (SFT) to the large dot. Right and up: learning. Right and "
                "down: the reward model is being exploited.",
            ),
            _paths(
                runs,
                "eval/kl",
                "eval/gold",
                "KL against gold",
                ("KL", "gold"),
                "Higher at equal KL is better.",
            ),
            _paths(
                runs,
                "eval/kl",
                "eval/worst_domain_gold",
                "KL against the worst domain's gold",
                ("KL", "gold, worst domain"),
                "Higher at equal KL is better.",
            ),
        ]
    panels.append(
        _paths(
            runs,
            "eval/kl",
            "eval/proxy",
            "KL against reward: the frontier",
            ("KL", "proxy"),
            "How much proxy each nat of KL buys.",
        )
    )
    return panels


def _groups(runs: list[Run]) -> Panels:
    panels: Panels = []
    for run in runs:
        if not run.groups:
            continue
        lines, many = run.stage("ppo"), sum(bool(each.groups) for each in runs) > 1
        suffix = f" ({run.name})" if many else ""
        for metric, title, caption in (
            ("score", "Score by group", "Group 0 is the hardest."),
            ("kl", "KL by group", ""),
            ("share", "Share of groups in the data", "Of the prompts as they come."),
            ("mass", "Share of groups in training", "Of the prompts that were drawn."),
            ("kl_coef", "KL coefficient by group", "Below the others: relaxed there."),
            ("weight", "Weight on advantages", "Above 1: the group is pushed harder."),
        ):
            keys = {
                f"group/{group}/{metric}": (_group(group, run.groups), SCALE[i % len(SCALE)])
                for i, group in enumerate(run.groups)
            }
            name = f"group_{metric}_{_file(run.name)}"
            panels.append(_over_steps(lines, keys, title + suffix, name, caption, "PPO step"))
        keys = {"group/gap": ("gap", SCALE[0]), "group/variance": ("variance", SCALE[2])}
        panels.append(
            _over_steps(
                lines, keys, f"Gap and variance{suffix}", f"group_gap_{_file(run.name)}",
                "Of the groups' returns.", "PPO step",
            )
        )  # fmt: skip
        panels.append(_contingency(run))
    return panels


def _metarm(runs: list[Run]) -> Panels:
    """All rounds in two rows, and then a row for each."""
    panels: Panels = []
    those = [run for run in runs if run.stage("metarm")]
    for run in those:
        suffix = f" ({run.name})" if len(those) > 1 else ""
        old, new = ("before", SFT_COLOUR), ("after", run.colour)
        for name, title, keys, caption in (
            (
                "accuracy",
                "Reward model's accuracy",
                {
                    "before/gold_accuracy": ("by gold, before", SCALE[3]),
                    "after/gold_accuracy": ("by gold, after", SCALE[0]),
                    "after/pair_accuracy": ("held-out pairs", SFT_COLOUR),
                },
                "On answers of the policy as it is at the start of the round.",
            ),
            (
                "spread",
                "Relative differences of rewards",
                {"before/spread": old, "after/spread": new},
                "Mean, in units of the difference within held-out pairs.",
            ),
            (
                "objective",
                "J on today's answers",
                {"before/objective": old, "after/objective": new},
                "Any training that makes rewards larger raises it.",
            ),
            (
                "policy",
                "Policy after the round",
                {"policy/proxy": ("proxy", SCALE[2]), "policy/gold": ("gold", SCALE[0])},
                "Proxy is the score by the round's own reward model.",
            ),
            ("kl", "KL from the SFT model", {"policy/kl": ("", run.colour)}, "Nats a sequence."),
            (
                "distinct",
                "Distinct answers, share",
                {"policy/distinct": ("", run.colour)},
                "Of a prompt's answers. Where it falls there is little left to tell apart.",
            ),
        ):
            name = f"metarm_{name}_{_file(run.name)}"
            panels.append(_by_round(run.stage("metarm"), keys, title + suffix, name, caption))
        for line in run.stage("metarm")[1:]:
            panels += _one_round(run, line, suffix)
    return panels


def _by_round(
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str,
    x: str = "round",
) -> Panel | None:
    """keys: metric -> (label, colour)."""
    curves = [(*each, *_series(lines, key)) for key, each in keys.items()]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    figure, axes = _new(title, x)
    for label, colour, rounds, values in curves:
        axes.plot(rounds, values, color=colour, marker="o", markersize=4, label=label)
    axes.set_xticks([line["step"] for line in lines])
    if len(curves) > 1:
        _legend(axes)
    return Panel(name, caption, figure)


def _one_round(run: Run, line: dict[str, Any], suffix: str) -> Panels:
    """Differences of rewards, the reward model's training, and PPO with what came out of it."""
    n = line["step"]
    folder, name = run.folder / "rounds" / str(n), f"metarm_round_{n}_{_file(run.name)}"
    inner = Run(run.name, folder, run.colour, lines=_read_lines(folder / "metrics.jsonl"))
    differences = {
        when: (_differences_of_rewards(folder, when, line.get(f"{when}/scale")), colour)
        for when, colour in (("before", SFT_COLOUR), ("after", run.colour))
    }
    return [
        _histogram(
            differences,
            f"Round {n}: differences of rewards{suffix}",
            "difference, relative",
            f"{name}_differences",
            "Between answers to one prompt; 1 is the mean within held-out pairs. More to the "
            "right: told apart better, rightly or wrongly.",
        ),
        _over_steps(
            inner.stage("metarm"),
            {"rm/pair_loss": ("pairs' loss", SCALE[3]), "metarm/spread": ("J", SCALE[0])},
            f"Round {n}: training the reward model{suffix}",
            f"{name}_training",
            "J is that of the step's answers.",
        ),
        _by_round(
            inner.evaluations,
            {"eval/proxy": ("proxy", SCALE[2]), "eval/gold": ("gold", SCALE[0])},
            f"Round {n}: PPO with it{suffix}",
            f"{name}_ppo",
            "On the evaluation prompts.",
            "PPO step",
        ),
    ]


def _differences_of_rewards(folder: Path, when: str, scale: float | None) -> list[float]:
    """Between every two different answers to a prompt, in units of `scale`."""
    answers: dict[str, dict[str, float]] = {}
    for line in _read_lines(folder / "answers.jsonl"):
        answers.setdefault(line["prompt"], {})[line["response"]] = line[when]
    return [
        abs(a - b) / scale
        for scores in answers.values()
        for a, b in itertools.combinations(scores.values(), 2)
        if scale
    ]


def _rewards(runs: list[Run]) -> Panels:
    def of(run: Run, key: str) -> list[float]:
        return [line[key] for line in run.final_samples if line.get(key) is not None]

    panels: Panels = [
        _histogram(
            {run.name: (of(run, key), run.colour) for run in runs},
            f"{label}, last evaluation",
            label.lower(),
            f"histogram_{key}",
        )
        for key, label in (("score", "Proxy"), ("gold", "Gold"), ("kl", "KL"))
    ]
    for run in runs:
        for by in ("domain", "group"):
            labels = sorted({str(s[by]) for s in run.final_samples if s.get(by) is not None})
            values = {
                (_group(label, labels) if by == "group" else label): (
                    [
                        line["score"]
                        for line in run.final_samples
                        if str(line.get(by)) == label and line.get("score") is not None
                    ],
                    SCALE[i % len(SCALE)],
                )
                for i, label in enumerate(labels)
            }
            if len(values) > 1:
                title = f"Proxy by {by}"
                name = f"histogram_score_by_{by}_{_file(run.name)}"
                panels.append(_histogram(values, title, "proxy", name, run.name))
    return panels


def _training(runs: list[Run]) -> Panels:
    first = runs[:1]
    panels: Panels = [
        _runs_over_steps(first, "sft", "sft/loss", "SFT loss"),
        _runs_over_steps(first, "rm", "rm/loss", "Reward model's loss"),
        _runs_over_steps(first, "rm", "rm/accuracy", "Reward model's accuracy on pairs"),
    ]
    for key, title, caption in (
        ("objective/scores", "Scores of training answers", ""),
        ("objective/kl", "KL in training, nats a sequence", ""),
        ("objective/kl_coef", "Mean KL coefficient", "Compare runs at equal mean, too."),
        ("objective/entropy", "Entropy of the policy", "A fall to 0 is a collapse."),
        ("policy/clipfrac", "Clipped ratios, share", "Above 0.3: steps are too large."),
        ("policy/approxkl", "Step's own KL", ""),
        ("policy/grad_norm", "Policy's gradient norm", ""),
        ("value/explained_var", "Critic: explained variance", "Below 0: worse than a constant."),
        ("rollout/length", "Length of answers", "A drift upward may be a shortcut."),
        ("rollout/truncated", "Truncated answers, share", ""),
        (
            "rollout/logprob_diff_max",
            "Log-probs: engine against trainer",
            "Largest difference; it should stay near rounding.",
        ),
    ):
        panels.append(_runs_over_steps(runs, "ppo", key, title, caption))
    panels += [_timing(run) for run in runs]
    return panels


SECTIONS: tuple[tuple[str, str, Callable[[list[Run]], Panels]], ...] = (
    (
        "Performance by domain",
        "Answers to evaluation prompts, the same at every step. The domains exist for this page "
        "only: the method does not see them.",
        _performance,
    ),
    (
        "Proxy, gold and KL",
        "Proxy is the score that training maximises; gold, where a program can judge, is what was "
        "meant, and trains nothing.",
        _optimisation,
    ),
    ("Groups", "What the method inferred during training, and what it did with it.", _groups),
    (
        "MetaRM, round by round",
        "Each round trains the reward model on, over the old pairs, with a look at the policy's "
        "answers, and then the policy with it. First all rounds, then a row for each.",
        _metarm,
    ),
    ("Distribution of rewards", "Answers of the last evaluation.", _rewards),
    ("Training", "Pale: every step. Strong: moving mean.", _training),
)


def _has_gold(runs: list[Run]) -> bool:
    return any("eval/gold" in line for run in runs for line in run.evaluations)


# HTML.


def _section(title: str, text: str, panels: list[Panel], target: Path) -> str:
    if not panels:
        return ""
    pictures = []
    for panel in panels:
        buffer = io.BytesIO()
        panel.figure.savefig(buffer, format="png", dpi=150)
        (target / "plots" / f"{panel.name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = escape(panel.figure.axes[0].get_title(loc="left") or panel.name)
        caption = f"<figcaption>{escape(panel.caption)}</figcaption>" if panel.caption else ""
        pictures.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'
        )
    return (
        f"<h2>{escape(title)}</h2><p>{escape(text)}</p>"
        f'<div class="panels">{"".join(pictures)}</div>'
    )


def _legend_entry(run: Run) -> str:
    return (
        f'<span class="run"><i style="background:{run.colour}"></i>{escape(run.name)} '
        f"<small>{escape(str(run.folder))}</small></span>"
    )


def _tiles(runs: list[Run]) -> str:
    """The two or three figures that matter, before and after."""
    if not any(run.final for run in runs):
        return ""
    gold = _has_gold(runs)
    wanted = (
        ("worst domain, gold", "eval/worst_domain_gold"),
        ("mean gold", "eval/gold"),
        ("out of distribution, gold", "eval/ood_gold"),
    )
    if not gold:
        wanted = (
            ("worst domain, proxy", "eval/worst_domain_score"),
            ("mean proxy", "eval/proxy"),
            ("KL", "eval/kl"),
        )
    tiles = []
    for label, key in wanted:
        sft = next((run.sft.get(key) for run in runs if run.sft), None)
        rows = [(SFT, SFT_COLOUR, sft)] + [
            (run.name, run.colour, run.final.get(key)) for run in runs if run.final
        ]
        entries = "".join(
            f'<div><i style="background:{colour}"></i>{escape(name)}<b>{_number(value)}</b></div>'
            for name, colour, value in rows
            if value is not None
        )
        if entries:
            tiles.append(f'<div class="tile"><h3>{label}</h3>{entries}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _table(runs: list[Run]) -> str:
    """Domains x {SFT, each run}: gold, proxy, KL at the last evaluation."""
    columns = [(SFT, run.sft) for run in runs if run.sft][:1]
    columns += [(run.name, {**run.final, **_over_the_run(run)}) for run in runs if run.final]
    if not columns:
        return ""
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    rows = [(domain, [f"domain/{domain}/{kind}" for kind in ("gold", "score", "kl")])
            for domain in domains]  # fmt: skip
    rows += [
        ("mean", ["eval/gold", "eval/proxy", "eval/kl"]),
        ("worst domain", ["eval/worst_domain_gold", "eval/worst_domain_score", ""]),
        ("out of distribution", ["eval/ood_gold", "eval/ood_proxy", ""]),
        ("mean, over the run", [f"over/eval/{name}" for name in ("gold", "proxy", "kl")]),
        (
            "worst domain, over the run",
            ["over/eval/worst_domain_gold", "over/eval/worst_domain_score", ""],
        ),
    ]
    kinds = [
        (i, label)
        for i, label in enumerate(("gold", "proxy", "KL"))
        if any(line.get(keys[i]) is not None for _, line in columns for _, keys in rows)
    ]
    head = "".join(f'<th class="block" colspan="{len(columns)}">{label}</th>' for _, label in kinds)
    names = "".join(
        f"<th{_block(column)}>{escape(name)}</th>" for column, (name, _) in enumerate(columns)
    ) * len(kinds)
    body = []
    for title, keys in rows:
        cells = []
        for i, label in kinds:
            values = [line.get(keys[i]) for _, line in columns]
            known = [value for value in values if value is not None]
            best = max(known) if known and label == "gold" else None
            for column, value in enumerate(values):
                number = _number(value)
                number = f"<b>{number}</b>" if best is not None and value == best else number
                cells.append(f"<td{_block(column)}>{number}</td>")
        if any(">–<" not in cell for cell in cells):
            body.append(f"<tr><th>{escape(title)}</th>{''.join(cells)}</tr>")
    return (
        f'<h2>Last evaluation</h2><div class="scroll"><table class="figures"><thead><tr><th></th>'
        f"{head}</tr><tr><th></th>{names}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p>One seed: differences of a few hundredths are noise. Over the run: the mean of all "
        "evaluations after the first third, which is steadier than the last one.</p>"
    )


def _over_the_run(run: Run) -> dict[str, float]:
    """over/<metric>: means of the policy's evaluations after the first third."""
    lines = [line for line in run.evaluations if line.get("policy") != "sft"]
    lines = lines[len(lines) // 3 :]
    out = {}
    for key in lines[-1] if lines else ():
        values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
        if key.startswith("eval/") and values:
            out[f"over/{key}"] = sum(values) / len(values)
    return out


def _block(column: int) -> str:
    """A line to the left of each block of columns."""
    return ' class="block"' if column == 0 else ""


def _differences(runs: list[Run]) -> str:
    """Settings in which the runs differ."""
    flat = [settings.flat(run.config) for run in runs]
    keys = sorted({key for each in flat for key in each})
    hidden = ("run.output", "run.stages", "run.threads", "model.policy", "model.reward")
    rows = [
        f"<tr><th>{escape(key)}</th>"
        + "".join(f"<td>{escape(str(each.get(key, '–')))}</td>" for each in flat)
        + "</tr>"
        for key in keys
        if len({str(each.get(key)) for each in flat}) > 1
        and key not in hidden
        and not key.startswith("baselines")
    ]
    if not rows:
        return ""
    names = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return (
        f'<h2>What differs between the runs</h2><div class="scroll"><table><thead><tr><th></th>'
        f"{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _samples(runs: list[Run], each: int = 4) -> str:
    """The same few prompts of each domain, with every run's answer."""
    shown = [run for run in runs if run.final_samples]
    if not shown:
        return ""
    counts: dict[str, int] = {}
    body = []
    by_prompt = [{line["prompt"]: line for line in run.final_samples} for run in shown]
    in_order = {domain: i for i, domain in enumerate(shown[0].domains)}
    for prompt, line in sorted(
        by_prompt[0].items(), key=lambda item: in_order.get(str(item[1].get("domain")), 99)
    ):
        domain = str(line.get("domain") or "")
        counts[domain] = counts.get(domain, 0) + 1
        if counts[domain] > each:
            continue
        answers = []
        for run, lines in zip(shown, by_prompt):
            theirs = lines.get(prompt)
            if theirs:
                figures = " · ".join(
                    f"{label} {_number(theirs[key], 2)}"
                    for key, label in (("gold", "gold"), ("score", "proxy"), ("group", "group"))
                    if theirs.get(key) is not None
                )
                answers.append(
                    f'<div class="answer" style="border-color:{run.colour}">'
                    f"<small>{escape(run.name)} · {figures}</small>"
                    f"<p>{escape(theirs['response'])}</p></div>"
                )
        label = f"<small>{escape(domain)}</small>" if domain else ""
        body.append(
            f'<div class="sample">{label}<p class="prompt">{escape(prompt)}</p>{"".join(answers)}'
            "</div>"
        )
    return f"<h2>Sample answers</h2><p>Of the last evaluation.</p>{''.join(body)}"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 1120px; padding: 24px 20px 60px; }}
h1 {{ font-size: 26px; margin: 0 0 6px; }}
h2 {{ font-size: 19px; margin: 40px 0 4px; }}
h3 {{ font-size: 13px; font-weight: 600; color: #555; margin: 0 0 6px; }}
p {{ margin: 4px 0 12px; color: #444; max-width: 760px; }}
small {{ color: #777; overflow-wrap: anywhere; }}
i {{ display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px; }}
.run {{ margin-right: 22px; display: inline-block; }}
.tiles, .panels {{ display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }}
.panels {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }}
.tiles {{ margin-top: 20px; }}
.tile {{ border: 1px solid #e3e3e3; border-radius: 8px; padding: 12px 16px; }}
.tile b {{ float: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 0; }}
figure img {{ width: 100%; height: auto; display: block; }}
figcaption {{ font-size: 13px; color: #666; padding: 0 6px 10px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; margin: 10px 0; }}
th, td {{ padding: 4px 12px; text-align: right; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; }}
thead th {{ color: #555; vertical-align: bottom; }}
tbody th {{ text-align: left; white-space: nowrap; font-weight: 500; }}
.block {{ border-left: 1px solid #ddd; }}
th.block[colspan] {{ text-align: center; }}
.sample {{ border-top: 1px solid #eee; padding: 10px 0; }}
.prompt {{ font-family: ui-monospace, monospace; font-size: 13px; margin: 2px 0 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 200px; overflow-y: auto; }}
.answer {{ border-left: 3px solid; padding-left: 10px; margin: 6px 0; }}
.answer p {{ font-family: ui-monospace, monospace; font-size: 13px; margin: 0; color: #222;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
details {{ margin-top: 18px; }}
summary {{ cursor: pointer; font-weight: 600; }}
pre {{ background: #f6f6f6; padding: 12px; overflow-x: auto; font-size: 12px; }}
</style></head><body>
<h1>{heading}</h1>
<div>{runs}</div>
{tiles}
{table}
{differences}
{sections}
{samples}
{settings}
</body></html>
"""
