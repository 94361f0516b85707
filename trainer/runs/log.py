"""metrics.jsonl and samples.jsonl, one flat object a line, and the optional sinks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from trainer import parallel
from trainer.runs.folder import RunFolder

# Of a stage, a step, and its figures.
Sink = Callable[[str, int, dict[str, float]], None]


class MetricsLog:
    """Appends one flat object a step to metrics.jsonl, flushed, and to the optional sinks.

    Opening it for a stage drops that stage's lines past `done` steps: what a killed run wrote after
    its last checkpoint is about to be written again.
    """

    def __init__(self, run: RunFolder, stages: Iterable[str], done: int, sinks: Iterable[str]):
        self.files: dict[str, TextIO] = {}
        self.writers: list[Sink] = []
        if not parallel.is_main():
            return
        run.path.mkdir(parents=True, exist_ok=True)
        for name, path in (("metrics", run.metrics), ("samples", run.samples)):
            kept = [
                line
                for line in read_lines(path)
                if line["stage"] not in stages or line["step"] <= done
                if done or line["stage"] not in stages
            ]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            aside.replace(path)
            self.files[name] = path.open("a")
        self.writers = [_SINKS[name](run) for name in sinks]

    def write(self, stage: str, step: int, metrics: Mapping[str, float], **labels: str) -> None:
        if not parallel.is_main():
            return
        values = {name: plain(value) for name, value in metrics.items()}
        self._append("metrics", {"stage": stage, "step": step, **labels, **values})
        for writer in self.writers:
            writer(stage, step, {k: v for k, v in values.items() if v is not None})

    def write_samples(self, stage: str, step: int, samples: Iterable[dict]) -> None:
        if parallel.is_main():
            for sample in samples:
                self._append("samples", {"stage": stage, "step": step, **sample})

    def _append(self, name: str, line: dict) -> None:
        self.files[name].write(json.dumps(line) + "\n")
        self.files[name].flush()

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


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; a last line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _tensorboard(run: RunFolder) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run.path / "tensorboard")

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        writer.flush()

    return write


def _wandb(run: RunFolder) -> Sink:
    import wandb

    session = wandb.init(project="gikernels", name=run.path.name, dir=run.path, resume="allow")
    seen: set[str] = set()

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        if stage not in seen:  # each stage counts its own steps
            session.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            seen.add(stage)
        session.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in values.items()}})

    return write


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}
