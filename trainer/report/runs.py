"""What run folders say: their metrics, samples and settings, and nothing else of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

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
            lines=read_lines(folder / "metrics.jsonl"),
            samples=read_lines(folder / "samples.jsonl"),
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file; a last line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def has_gold(runs: list[Run]) -> bool:
    return any("eval/gold" in line for run in runs for line in run.evaluations)
