"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

One run here is one run there, over all stages and over restarts: its name there is kept in the run
folder (`.sinks.json`), and given up when everything in the folder is done anew. After a crash the
steps since the last checkpoint are sent again; metrics.jsonl has each step once.
"""

from __future__ import annotations

import atexit
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from trainer.runs import files
from trainer.runs.folder import RunFolder

ROWS = 1000
"""Answers in the table of one evaluation, at most."""
COLUMNS = ("prompt", "response", "domain", "group", "score", "gold", "kl")

Values = Mapping[str, float]


class Sink(Protocol):
    def begin(self, stage: str, done: int) -> None:
        """A stage's steps go on after `done`."""

    def write(self, stage: str, step: int, values: Values) -> None: ...

    def samples(self, stage: str, step: int, rows: Sequence[dict]) -> None: ...

    def close(self) -> None: ...


_open: dict[tuple[Path, str], Sink] = {}
"""By run folder and name: a run stays the same one from stage to stage of a process."""


def of(run: RunFolder, names: Sequence[str], project: str) -> list[Sink]:
    """The run's sinks, opened where this process has not yet done so."""
    found = []
    for name in names:
        key = (run.path.resolve(), name)
        if key not in _open:
            _open[key] = _SINKS[name](run, project)
        found.append(_open[key])
    return found


@atexit.register
def close() -> None:
    """All of this process; what is still under way is sent first."""
    while _open:
        _open.popitem()[1].close()


def forget(run: RunFolder) -> None:
    """The next start of this folder is another run."""
    run.sinks.unlink(missing_ok=True)


def identity(run: RunFolder) -> tuple[str, str, str]:
    """An id of the run's own, its name, and the name of what it belongs to."""
    try:
        said = json.loads(run.sinks.read_text(encoding="utf-8"))
        own = str(said["id"])
    except (OSError, ValueError, TypeError, KeyError):
        own = secrets.token_hex(4)
        files.write(run.sinks, json.dumps({"id": own}) + "\n")
    path = run.path.resolve()
    inner = path.parent.name in ("baselines", "rounds")  # of the run two folders up
    whole = path.parents[1].name if inner else path.name
    return own, f"{whole}/{path.name}" if inner else whole, whole


def settings(run: RunFolder) -> dict[str, Any]:
    """What config.yaml says; {} before there is one."""
    try:
        return yaml.safe_load(run.config.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def table(rows: Sequence[dict]) -> tuple[list[str], list[list[Any]]]:
    """Columns that any row has, and the rows."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    return columns, [[row.get(name) for name in columns] for row in rows[:ROWS]]


class TensorBoard:
    """A folder for each stage, for each counts its own steps; a stage that goes on hides what was
    written of steps that are done again."""

    def __init__(self, run: RunFolder, project: str) -> None:
        self.folder, self.run = run.path / "tensorboard", run
        self.done: dict[str, int] = {}
        self.writers: dict[str, Any] = {}

    def begin(self, stage: str, done: int) -> None:
        self.done[stage] = done
        if stage in self.writers:
            self.writers.pop(stage).close()

    def _writer(self, stage: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self.writers:
            purge = self.done.get(stage, 0) + 1
            writer = SummaryWriter(self.folder / stage, purge_step=purge)
            said = self.run.config.read_text(encoding="utf-8") if self.run.config.is_file() else ""
            writer.add_text("config", _as_code(said), purge)
            self.writers[stage] = writer
        return self.writers[stage]

    def write(self, stage: str, step: int, values: Values) -> None:
        writer = self._writer(stage)
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        writer.flush()

    def samples(self, stage: str, step: int, rows: Sequence[dict]) -> None:
        columns, cells = table(rows)
        lines = [columns, ["---"] * len(columns), *cells]
        text = "\n".join("| " + " | ".join(map(_in_cell, line)) + " |" for line in lines)
        self._writer(stage).add_text(f"{stage}/samples", text, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def _as_code(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def _in_cell(value: Any) -> str:
    """Of a Markdown table: on one line, and no markup."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    for letter, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(letter, instead)
    return text


class Wandb:
    def __init__(self, run: RunFolder, project: str) -> None:
        import wandb

        own, name, whole = identity(run)
        self.seen: set[str] = set()
        self.session = wandb.init(
            project=project,
            id=own,
            name=name,
            group=whole,
            dir=run.path,
            config=settings(run),
            resume="allow",
            reinit="create_new",  # a baseline in the same process is a run of its own
        )

    def begin(self, stage: str, done: int) -> None:
        if stage not in self.seen:  # each stage counts its own steps
            self.session.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.seen.add(stage)

    def write(self, stage: str, step: int, values: Values) -> None:
        self.begin(stage, 0)
        self.session.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in values.items()}})

    def samples(self, stage: str, step: int, rows: Sequence[dict]) -> None:
        import wandb

        columns, cells = table(rows)
        shown = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        self.session.log({f"{stage}/step": step, f"{stage}/samples": shown})

    def close(self) -> None:
        self.session.finish()


class Trackio:
    """On this machine: `trackio show --project ...`. It tells runs apart by their names."""

    def __init__(self, run: RunFolder, project: str) -> None:
        import trackio

        own, name, whole = identity(run)
        self.session = trackio.init(
            project=project,
            name=f"{name}-{own}".replace("/", "-"),
            group=whole,
            config=settings(run),
            resume="allow",
            embed=False,
        )

    def begin(self, stage: str, done: int) -> None:
        """Steps are said with each line."""

    def write(self, stage: str, step: int, values: Values) -> None:
        self.session.log({f"{stage}/{k}": v for k, v in values.items()}, step=step)

    def samples(self, stage: str, step: int, rows: Sequence[dict]) -> None:
        import trackio

        columns, cells = table(rows)
        shown = trackio.Table(columns=columns, data=cells)
        self.session.log({f"{stage}/samples": shown}, step=step)

    def close(self) -> None:
        self.session.finish()


_SINKS: dict[str, Callable[[RunFolder, str], Sink]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio,
}  # fmt: skip
