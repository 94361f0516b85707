"""What run folders say: their metrics, samples and settings, and nothing else of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer import config as settings
from trainer.runs import log
from trainer.runs.names import label

SFT = "SFT"
RUN_COLOURS = ("#c8553d", "#2e6f95", "#588157", "#8e6c8a", "#b08900", "#1b998b", "#5f4b8b")
SFT_COLOUR = "#7d8597"


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
        found = dict.fromkeys(label(key) for key in keys if key.startswith("domain/"))
        return [name for name in found if name]

    @property
    def groups(self) -> list[str]:
        last = self.stage("ppo")[-1:] or [{}]
        names = {label(key) for key in last[0] if key.startswith("group/")}
        groups = sorted((name for name in names if _is_group(name)), key=int)
        return groups if len(groups) > 1 else []

    @property
    def final_samples(self) -> list[dict[str, Any]]:
        evaluated = [line for line in self.samples if line.get("stage") == "eval"]
        last = max((line["step"] for line in evaluated), default=None)
        return [line for line in evaluated if line["step"] == last]


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
            lines=numbers_of(read_lines(folder / "metrics.jsonl")),
            samples=samples_of(folder / "samples.jsonl"),
        )
        for i, (name, folder) in enumerate(found)
    ]


def _is_group(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 4


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, 10):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _what_it_is(folder: Path) -> str:
    groups = _read_config(folder).get("groups")
    inference = groups.get("inference") if isinstance(groups, dict) else None
    if inference is None:
        return folder.resolve().name
    return "PPO" if inference == "none" else "group-invariant PPO"


def _read_config(folder: Path) -> dict[str, Any]:
    """{} where there is none, or none that can be read: the report shows what there is."""
    try:
        return settings.read(folder / "config.yaml")[0] if (folder / "config.yaml").exists() else {}
    except settings.ConfigError:
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of metrics: lines of a stage and a step, whose other values are finite numbers or short
    texts. A folder may come from anywhere."""
    lines = []
    for line in log.read_lines(path):
        if isinstance(line.get("stage"), str) and _is_count(line.get("step")):
            lines.append({str(k): v for k, v in line.items() if _is_plain(v)})
    return lines


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_plain(value: object) -> bool:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return abs(value) < 1e300  # false for NaN
    return value is None or isinstance(value, str)


def samples_of(path: Path) -> list[dict[str, Any]]:
    """Lines with a prompt and a response."""
    return [
        line
        for line in read_lines(path)
        if isinstance(line.get("prompt"), str) and isinstance(line.get("response"), str)
    ]


def numbers_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without texts in the place of figures."""
    words = ("stage", "policy")
    return [{k: v for k, v in x.items() if k in words or not isinstance(v, str)} for x in lines]


def has_gold(runs: list[Run]) -> bool:
    return any("eval/gold" in line for run in runs for line in run.evaluations)
