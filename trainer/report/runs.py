"""What run folders say: their metrics, samples and settings, and nothing else of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer import config as settings
from trainer.report.colours import RUN_NAMES
from trainer.runs import log
from trainer.runs.names import label

SFT = "SFT"


@dataclass
class Run:
    """What one run folder says."""

    name: str
    folder: Path
    colour: str
    """A name of `colours`."""
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, name: str) -> list[dict[str, Any]]:
        return self._by_stage.get(name, [])

    @cached_property
    def _by_stage(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            found.setdefault(line["stage"], []).append(line)
        return found

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

    def steps(self, stage: str) -> int | None:
        """Of a whole stage, where the settings say."""
        section = self.config.get(stage)
        steps = section.get("steps") if isinstance(section, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def final_samples(self) -> list[dict[str, Any]]:
        evaluated = [line for line in self.samples if line.get("stage") == "eval"]
        last = max((line["step"] for line in evaluated), default=None)
        return [line for line in evaluated if line["step"] == last]


def read_runs(folders: Sequence[Path], read: Reader | None = None) -> list[Run]:
    """`read`: of one that has read before, and reads what is new."""
    read = read or Reader()
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
            colour=RUN_NAMES[i % len(RUN_NAMES)],
            config=_read_config(folder),
            lines=read.metrics(folder / "metrics.jsonl"),
            samples=read.samples(folder / "samples.jsonl"),
        )
        for i, (name, folder) in enumerate(found)
    ]


class Reader:
    """Lines of files that grow. Each is read once, and again where a file is no longer the one that
    was read: a run that is started again writes it anew."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[int, int, list[dict[str, Any]]]] = {}

    def metrics(self, path: Path) -> list[dict[str, Any]]:
        return self._lines(path, numbers_of)

    def samples(self, path: Path) -> list[dict[str, Any]]:
        return self._lines(path, samples_of)

    def _lines(
        self, path: Path, of: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        try:
            with path.open("rb") as file:
                there, inode = os.fstat(file.fileno()), os.fstat(file.fileno()).st_ino
                before, end, lines = self._read.get(path, (inode, 0, []))
                if before != inode or there.st_size < end:
                    end, lines = 0, []
                file.seek(end)
                new = file.read()
        except OSError:
            return []
        whole = new.rfind(b"\n") + 1
        lines = lines + of(usable(log.lines_of(new[:whole])))
        self._read[path] = (inode, end + whole, lines)
        return lines + of(usable(log.lines_of(new[whole:])))  # a last line that is whole, unended


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
    return usable(log.read_lines(path))


def usable(found: list[dict]) -> list[dict[str, Any]]:
    """Of metrics: lines of a stage and a step, whose other values are finite numbers or short
    texts. A folder may come from anywhere."""
    lines = []
    for line in found:
        if isinstance(line.get("stage"), str) and _is_count(line.get("step")):
            lines.append({str(k): v for k, v in line.items() if _is_plain(v)})
    return lines


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_plain(value: object) -> bool:
    if isinstance(value, float | int):
        return abs(value) < 1e300  # false for NaN
    return value is None or isinstance(value, str)


def samples_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines with a prompt and a response."""
    return [
        line
        for line in lines
        if isinstance(line.get("prompt"), str) and isinstance(line.get("response"), str)
    ]


def numbers_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without texts in the place of figures."""
    words = ("stage", "policy")
    return [
        {k: v for k, v in x.items() if k in words or not isinstance(v, str | bool)} for x in lines
    ]


def has_gold(runs: list[Run]) -> bool:
    return any("eval/gold" in line for run in runs for line in run.evaluations)
