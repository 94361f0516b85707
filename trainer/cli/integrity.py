"""`gi doctor RUN`: whether everything in a run folder is what was written there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer import config as settings
from trainer.config import ConfigError
from trainer.runs import files
from trainer.runs.checkpoint import FINISHED, steps_done, steps_in
from trainer.runs.folder import RunFolder
from trainer.runs.log import broken_lines
from trainer.runs.names import one_line

Finding = tuple[str, str | None]
"""What was looked at, and what is wrong with it."""


def show(names: Sequence[str]) -> int:
    """One line for each thing that was looked at; 1 where something is wrong."""
    bad = 0
    for name in names:
        folder = Path(name)
        if not (folder.is_dir() and (folder / "config.yaml").exists()):
            raise ConfigError("no run folder: config.yaml is not there", where=one_line(name, 200))
        for what, problem in looked_at(RunFolder(folder)):
            bad += problem is not None
            print(one_line(f"{what:<44} {problem or 'whole'}", 300))
        left = [each for each in (folder / ".begin",) if each.exists()]
        for each in left:
            print(f"{each}: a start was killed while it tidied up; the next one finishes it")
    return 1 if bad else 0


def looked_at(run: RunFolder) -> Iterator[Finding]:
    folders = [run, *(RunFolder(p) for p in sorted(run.rounds.glob("[0-9]*")))]
    folders += [RunFolder(p) for p in sorted(run.path.glob("baselines/*")) if p.is_dir()]
    for each in folders:
        yield from _one(each)


def _one(run: RunFolder) -> Iterator[Finding]:
    if run.config.exists():
        yield str(run.config), _settings(run.config)
    for path in (run.metrics, run.samples, run.answers):
        if path.exists():
            broken = broken_lines(path)
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            yield str(path), f"line {broken[0]}{more} is not what was written" if broken else None
    if run.pairs.exists():
        whole = files.read_whole_lines(run.pairs) is not None
        yield str(run.pairs), None if whole else "is not what was written"
    for path in sorted((run.path / "models").glob("[!.]*")):
        yield str(path), files.problem(path)
    for stage in sorted((run.path / "checkpoints").glob("[!.]*")):
        if (stage / FINISHED).exists():
            said = steps_done(stage)
            yield str(stage / FINISHED), None if said is not None else "is not what was written"
        for _, path in sorted(steps_in(stage).items()):
            yield str(path), files.problem(path)


def _settings(path: Path) -> str | None:
    try:
        settings.load(str(path))
    except ConfigError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
