"""metrics.jsonl and samples.jsonl, one flat object a line, and the optional sinks.

Each line ends in its own checksum, `"crc32"`, of what stands before it: a line that a disk or an
editor has changed is told and left out, wherever it stands.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from trainer import parallel
from trainer.runs import files, sinks
from trainer.runs.console import say
from trainer.runs.faults import RunError
from trainer.runs.folder import RunFolder

CHECKSUM = "crc32"


class MetricsLog:
    """Appends one flat object a step to metrics.jsonl, flushed, and to the optional sinks.

    Opening it for a stage drops that stage's lines past `done` steps: what a killed run wrote after
    its last checkpoint is about to be written again.
    """

    def __init__(
        self,
        run: RunFolder,
        stages: Iterable[str],
        done: int,
        beside: Sequence[str] = (),
        project: str = "",
    ):
        """`beside`: names of sinks, which file the run under `project`."""
        self.files: dict[str, TextIO] = {}
        self.run = run
        self.sinks: list[sinks.Sink] = []
        if not parallel.is_main():
            return
        run.path.mkdir(parents=True, exist_ok=True)
        for name, path in (("metrics", run.metrics), ("samples", run.samples)):
            kept = [
                line
                for line in read_lines(path, tell=True)
                if line["stage"] not in stages or line["step"] <= done
                if done or line["stage"] not in stages
            ]
            files.write(path, "".join(map(sealed, kept)))
            self.files[name] = path.open("a")
        self.sinks = sinks.of(run, beside, project)
        for sink in self.sinks:
            for stage in stages:
                sink.begin(stage, done)

    def write(self, stage: str, step: int, metrics: Mapping[str, float], **labels: str) -> None:
        if not parallel.is_main():
            return
        values = {name: plain(value) for name, value in metrics.items()}
        self._append("metrics", {"stage": stage, "step": step, **labels, **values})
        for sink in self.sinks:
            sink.write(stage, step, {k: v for k, v in values.items() if v is not None})

    def write_samples(self, stage: str, step: int, samples: Iterable[dict]) -> None:
        if not parallel.is_main():
            return
        rows = [{name: _without_nan(value) for name, value in row.items()} for row in samples]
        for row in rows:
            self._append("samples", {"stage": stage, "step": step, **row})
        for sink in self.sinks:
            sink.samples(stage, step, rows)

    def _append(self, name: str, line: dict) -> None:
        file = self.files[name]
        file.write(sealed(line))
        file.flush()
        try:
            here = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
        except FileNotFoundError:
            here = False
        if not here:
            raise RunError(
                f"{self.run.path} was removed or renamed while the run wrote to it; what it has "
                "since written is lost with it"
            )

    def sync(self) -> None:
        """Onto the disk, before a checkpoint that counts on it."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def plain(value: Any) -> float | int | None:
    """A JSON number; what is not finite becomes null, for JSON has no NaN."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if math.isfinite(value) else None


def _without_nan(value: Any) -> Any:
    return plain(value) if isinstance(value, float) else value


def sealed(line: Mapping[str, Any]) -> str:
    """A line with its checksum, of what stands before it."""
    text = json.dumps(line, allow_nan=False)[:-1]
    comma = ", " if line else ""
    return f'{text}{comma}"{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_lines(path: Path, tell: bool = False) -> list[dict]:
    """The objects of a .jsonl file, whole ones; of the others the first is named where `tell`.

    A last line without its end was cut short by a crash, and is written again by who goes on.
    """
    lines, broken = _read(path)
    if broken and tell:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        say(f"{path}: line {broken[0]}{more} is not what was written, and is left out")
    return lines


def lines_of(data: bytes) -> list[dict]:
    """The objects of a part of such a file that begins where a line does."""
    found = map(_opened, data.decode("utf-8", "replace").split("\n"))
    return [line for line in found if line is not None]


def broken_lines(path: Path) -> list[int]:
    """Numbers, from 1, of the lines that are not what was written."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[dict], list[int]]:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return [], []
    *whole, cut = text.split("\n")
    opened = [_opened(each) for each in whole]
    broken = [number for number, line in enumerate(opened, 1) if line is None]
    return [line for line in (*opened, _opened(cut)) if line is not None], broken


def _opened(text: str) -> dict | None:
    """The object of a line; None where it is not what was written. Lines of older versions, and of
    other programs, have no checksum and are taken as they are."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    said = line.pop(CHECKSUM, None)
    if said is None:
        return line
    body = text.rpartition(f', "{CHECKSUM}": ')[0]
    return line if said == f"{zlib.crc32(body.encode()):08x}" else None
