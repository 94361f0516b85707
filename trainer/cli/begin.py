"""From a command to a run folder that is this run's: checked, locked, and in order.

    with begin.folder(config, command, stages, resume) as (run, resume):
        ...

Nothing is written before everything is checked. What a killed start has left half done is finished
here: a swap of two folders, or the removal of what stages had made that were to be done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer import config as settings
from trainer import parallel
from trainer.cli.changes import ORDER, refuse_changes, write_settings
from trainer.config import Config, ConfigError
from trainer.runs import checkpoint, files, lock, sinks
from trainer.runs.console import say
from trainer.runs.folder import RunFolder
from trainer.runs.names import one_line
from trainer.stages import baselines, metarm


@contextlib.contextmanager
def folder(
    config: Config, command: str, stages: Sequence[str], resume: bool
) -> Iterator[tuple[RunFolder, bool]]:
    """The run's folder, and whether it goes on there."""
    run = RunFolder(config.run.output)
    with lock.held(run):
        resume = resume or accepted(run, config, stages)
        changed = check(config, command, resume)  # again: it may have changed until it was locked
        parallel.barrier()  # every rank has read what is there
        if command != "eval":
            if parallel.is_main():
                settle(run)
            parallel.barrier()
            do_again(run, () if resume else stages)
            if changed:
                say(f"goes on with other settings: {', '.join(one_line(c, 200) for c in changed)}")
            if parallel.is_main():
                write_settings(run, config, changed)
                files.write(run.accepted, attempt(config, stages))
            parallel.barrier()
        yield run, resume


# --- before anything is written -------------------------------------------------------------------


def check(config: Config, command: str, resume: bool) -> list[str]:
    """The folder can be written to, and a run is not silently overwritten by one with other
    settings; returns what changes in one that goes on."""
    run = RunFolder(config.run.output)
    _check_place(run)
    if not run.config.is_file() or command == "eval":
        return []
    if resume:
        return refuse_changes(run, config)
    changed = settings.differences(config, settings.load(str(run.config)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        shown = ", ".join(one_line(each, 120) for each in changed[:3])
        raise ConfigError(
            f"holds a run with other settings ({shown}{more}); choose another --output, or delete "
            "it",
            where=config.run.output,
        )
    return []


def _check_place(run: RunFolder) -> None:
    path = run.path
    said = str(path)

    def refuse(problem: str) -> None:
        raise ConfigError(problem, "run.output", one_line(said, 200))

    try:
        if path.is_symlink() and not path.exists():
            refuse("is a link to nothing; want a folder")
        if path.exists() and not path.is_dir():
            refuse("is a file; want a folder")
        there = path
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            refuse(f"{there} is a file; want a folder")
        if not os.access(there, os.W_OK | os.X_OK) or not _is_a_disk(there):
            refuse(f"nothing can be written in {there}")
    except OSError as error:
        refuse(error.strerror or str(error))
    models = [run.model(name) for name in ("sft", "rm", "policy")]
    own = [run.lock, run.config, run.metrics, run.samples, run.pairs]
    folders = [path / name for name in ("models", "checkpoints", "rounds", "baselines")]
    for each in [*own, *folders, *models]:
        if each.is_symlink():
            refuse(f"{each.relative_to(path)} in it is a link; want the run's own")


def _is_a_disk(path: Path) -> bool:
    """Not /proc and its like, where a folder says it can be written to and cannot."""
    return not any(path.resolve().is_relative_to(each) for each in ("/proc", "/sys"))


# --- restarts -------------------------------------------------------------------------------------


def attempt(config: Config, stages: Sequence[str]) -> str:
    """The launch that this process belongs to, the same for all of its restarts by torchrun, and
    what it was asked for."""
    asked = hashlib.sha256(repr((config.to_yaml(), tuple(stages))).encode()).hexdigest()
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    launch = [os.environ.get(name, "") for name in names]
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # torchrun is our parent
        launch += [str(os.getppid()), _started(os.getppid())]
    return json.dumps({"launch": launch, "asked": asked}) + "\n"


def _started(pid: int) -> str:
    """When a process began, for numbers of processes come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def accepted(run: RunFolder, config: Config, stages: Sequence[str]) -> bool:
    """Whether torchrun starts us again and the attempt before has taken this folder: then we go on.
    Else a restart is held to what the first start was held to."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    ours = None
    if parallel.is_main():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            ours = run.accepted.read_text(encoding="utf-8") == attempt(config, stages)
    return any(parallel.gather_objects(bool(ours)))


# --- order ----------------------------------------------------------------------------------------


def settle(run: RunFolder) -> None:
    """Swaps and removals that a kill has left half done."""
    inner = [*run.rounds.glob("[0-9]*")]
    if not baselines.beside():  # else they are processes, which settle their own
        inner += run.path.glob("baselines/[!.]*")
    for each in (run, *map(RunFolder, inner)):
        for parent in (each.path, each.path / "models", each.path / "checkpoints"):
            files.settle(parent)
    files.settle(run.rounds)


def do_again(run: RunFolder, stages: Sequence[str]) -> None:
    """Remove what these stages have left, and what a start before us was killed in removing.

    They are named in the folder until all is gone. Marks of what is done go first, so that at no
    moment a stage is taken for done whose traces are half removed.
    """
    if parallel.is_main():
        told = [] if not run.begun.is_file() else run.begun.read_text(errors="replace").split()
        again = [stage for stage in ORDER if stage in {*told, *stages}]
        if again:
            files.write(run.begun, " ".join(again) + "\n")
            # baselines too are done again, from models that are new
            beside = run.path.glob("baselines/[!.]*") if "ppo" in again else ()
            traces = [(run, stage) for stage in again]
            traces += [(RunFolder(path), "ppo") for path in beside]
            for each, stage in traces:
                checkpoint.unmark(each.checkpoints(stage))
            metarm.undo(run)
            for each, stage in traces:
                checkpoint.forget_here(each, stage)
                if each is not run:
                    each.config.unlink(missing_ok=True)
                    sinks.forget(each)
            left = [stage for stage in ORDER if stage not in again]
            if all(checkpoint.steps_done(run.checkpoints(stage)) is None for stage in left):
                sinks.forget(run)
            run.begun.unlink()
            files.sync_folder(run.path)
    parallel.barrier()
