"""`gi samples RUN [RUN] [domain=... group=... score=LOW..HIGH ...]`: answers in the terminal.

Those of several runs, and of the baselines in a folder, stand side by side. What models have
written goes through `names.printable`: no answer can steer the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer import config as settings
from trainer.config import ConfigError
from trainer.report.colours import ON_WHITE
from trainer.report.runs import Run, read_runs
from trainer.runs.names import one_line, printable

FIGURES = {"score": "proxy", "gold": "gold", "kl": "KL", "group": "group"}
ORDERS = ("as_they_came", "lowest", "highest", "apart")
LONGEST = 2000
"""Characters of a text, where chars does not say more."""


@dataclass
class Wanted:
    """Which answers, in which order, how many. Each is a filter of this name: `domain=sort`."""

    domain: str = ""
    group: str = ""
    step: str = ""
    """A number, or `all`; empty: the last evaluation."""
    words: str = ""
    """In the prompt or in the answer."""
    sort: str = ORDERS[0]
    by: str = "score"
    """What sort compares."""
    count: int = 10
    chars: int = LONGEST
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """score, gold or kl -> from, to."""

    @staticmethod
    def of(filters: Sequence[str]) -> Wanted:
        wanted = Wanted()
        for each in filters:
            name, _, value = each.partition("=")
            if name in ("score", "gold", "kl"):
                wanted.bounds[name] = _range(name, value)
            elif name in ("count", "chars"):
                setattr(wanted, name, _whole(name, value))
            elif name in ("domain", "group", "step", "words", "sort", "by"):
                setattr(wanted, name, value)
            else:
                known = ["domain", "group", "step", "words", "sort", "by", "count", "chars"]
                known += ["score", "gold", "kl"]
                meant = settings.did_you_mean(name, known)
                raise ConfigError(f"no such filter{meant}; want {', '.join(known)}", name)
        settings.require(wanted.sort in ORDERS, "sort", wanted.sort, " or ".join(ORDERS))
        settings.require(wanted.by in ("score", "gold", "kl"), "by", wanted.by, "score, gold or kl")
        if wanted.step not in ("", "all"):
            _whole("step", wanted.step)
        return wanted

    def takes(self, line: dict[str, Any], last: int) -> bool:
        step = str(last) if self.step == "" else self.step
        text = f"{line['prompt']}\n{line['response']}".lower()
        return (
            (step == "all" or line["step"] == int(step))
            and self.domain in ("", str(line.get("domain")))
            and self.group in ("", str(line.get("group")))
            and self.words.lower() in text
            and all(
                isinstance(line.get(name), int | float) and low <= line[name] <= high
                for name, (low, high) in self.bounds.items()
            )
        )

    def place(self) -> Callable[[list[tuple[Run, dict[str, Any]]]], float]:
        """What prompts are sorted by, from their answers; those without a figure come last."""

        def key(answers: list[tuple[Run, dict[str, Any]]]) -> float:
            values = [x for _, line in answers if (x := line.get(self.by)) is not None]
            if not values:
                return math.inf
            low, high = min(values), max(values)
            return {"lowest": low, "highest": -high, "apart": low - high}.get(self.sort, 0.0)

        return key


def _whole(name: str, value: str) -> int:
    settings.require(value.isascii() and value.isdigit(), name, value, "a whole number, 0 or more")
    return int(value)


def _range(name: str, value: str) -> tuple[float, float]:
    low, dots, high = value.partition("..")
    try:
        ends = (float(low or "-inf"), float(high or "inf")) if dots else (float(low), float(low))
    except ValueError:
        ends = (1.0, 0.0)
    settings.require(ends[0] <= ends[1], name, value, "LOW..HIGH, LOW.., ..HIGH or a number")
    return ends


Answers = dict[str, list[tuple[Run, dict[str, Any]]]]
"""Prompt -> its answers, and whose they are."""


def select(runs: Sequence[Run], wanted: Wanted) -> Answers:
    found: Answers = {}
    for run in runs:
        lines = [line for line in run.samples if line["stage"] == "eval"] or run.samples
        last = max((line["step"] for line in lines), default=0)
        for line in lines:
            if wanted.takes(line, last):
                found.setdefault(line["prompt"], []).append((run, line))
    return dict(sorted(found.items(), key=lambda item: wanted.place()(item[1])))


def show(folders: Sequence[Path], filters: Sequence[str], console: Console | None = None) -> int:
    wanted, runs = Wanted.of(filters), read_runs(folders)
    runs = [run for run in runs if run.samples]
    console = console or Console(highlight=False)
    if not runs:
        raise ConfigError("has no samples (yet)", where=str(Path(folders[0]) / "samples.jsonl"))
    found = select(runs, wanted)
    chosen = list(found.items())[: wanted.count]
    for i, (prompt, answers) in enumerate(chosen):
        domain = answers[0][1].get("domain")
        console.rule(
            Text(f"{i + 1} of {len(found)}" + (f"  {one_line(domain)}" if domain else "")),
            align="left",
            style="dim",
        )
        console.print(Text(_cut(prompt, wanted.chars)))
        console.print(_side_by_side(runs, answers, wanted.chars, console.width))
    console.print(Text(_summary(runs, found, len(chosen))))
    return 0


def _side_by_side(
    runs: Sequence[Run], answers: list[tuple[Run, dict[str, Any]]], chars: int, width: int
) -> Table:
    """A column for each run where there is room for them, or one below the other."""
    there = [run for run in runs if any(each is run for each, _ in answers)]
    cells = []
    for run in there:
        cell = Text()
        for line in (line for each, line in answers if each is run):
            cell.append(_head(run, line) + "\n", style=f"bold {ON_WHITE[run.colour]}")
            cell.append(_cut(line["response"], chars) + "\n")
        cells.append(cell)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    beside = width >= 40 * len(there)
    for _ in there if beside else there[:1]:
        table.add_column(ratio=1, overflow="fold")
    for row in [cells] if beside else [[cell] for cell in cells]:
        table.add_row(*row)
    return table


def _head(run: Run, line: dict[str, Any]) -> str:
    said = [one_line(run.name), f"step {line['step']}"]
    for name, label in FIGURES.items():
        value = line.get(name)
        if isinstance(value, int | float):
            said.append(f"{label} {value:.3g}")
    if "right" in line:
        said.append("right" if line["right"] else "wrong")
    return " · ".join(said)


def _cut(text: str, chars: int) -> str:
    if chars and len(text) > chars:
        more = len(text) - chars
        text = f"{text[:chars]}\n[{more} more characters; chars=0 shows all]"
    return printable(text)


def _summary(runs: Sequence[Run], found: Answers, shown: int) -> str:
    if not found:
        some = [line for run in runs for line in run.samples]
        there = {
            name: sorted({one_line(line[name]) for line in some if line.get(name) is not None})
            for name in ("domain", "group", "step")
        }
        said = [f"{name}: {', '.join(values[:20])}" for name, values in there.items() if values]
        return f"no answer is like that; there are {'; '.join(said)}"
    means = []
    for run in runs:
        lines = [line for answers in found.values() for each, line in answers if each is run]
        figures = [
            f"{label} {sum(values) / len(values):.3f}"
            for name, label in (("gold", "gold"), ("score", "proxy"))
            if (values := [x for line in lines if (x := line.get(name)) is not None])
        ]
        means.append(f"{one_line(run.name)}: {len(lines)} answers, mean {', '.join(figures)}")
    more = f" (count={len(found)} shows all)" if shown < len(found) else ""
    return f"{shown} of {len(found)} prompts{more}; {'; '.join(means)}"
