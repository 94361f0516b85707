"""Checkpoints that cannot be lost, and how a run goes on from one.

    checkpoints/<stage>/step_<n>/                  tensors, by torch.distributed.checkpoint
    checkpoints/<stage>/step_<n>/manifest.json     size and checksum of every file, written last

A checkpoint is written aside, flushed to the disk and renamed: a folder of this name was whole
once, and the manifest tells whether it still is. Nothing older is removed before the newer one is
in place. All that a stage's future depends on is in its `TrainState` (models, optimisers, what the
loop keeps between steps) and in the global random generators of every rank, for a reward function
may use them. Data order, our own randomness and learning rates are functions of the step. There is
no pickle in it that anybody reads: see `state` and `reader`.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainer import parallel
from trainer.config import Config
from trainer.runs import files
from trainer.runs.console import say
from trainer.runs.faults import Diverged, Guard, RunError, Stopped, StopSignal
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.reader import SafeReader, Unsafe, read_index
from trainer.runs.state import RandomStates, TrainState, filled, flat

FINISHED = "finished"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant


class CheckpointError(RunError):
    """One line: which checkpoint, and why it could not be written or read."""


class Checkpoints:
    """What a stage's loop has to do with checkpoints.

        with Checkpoints(config, run, "sft", state, resume) as checkpoints:    # loads the newest
            while state.step < steps:
                ...
                checkpoints.after_step(log, metrics, guard)    # saves; leaves after SIGTERM

    Leaving waits for a checkpoint that is still being written in the background.
    """

    def __init__(
        self, config: Config, run: RunFolder, stage: str, state: TrainState, resume: bool
    ) -> None:
        self.config, self.state, self.stage = config.trainer, state, stage
        self.folder = run.checkpoints(stage)
        self.stop = StopSignal()
        self.random = RandomStates()
        self.random.seed(config.run.seed, stage)
        self.threads = ThreadPoolExecutor(1, "checkpoint")
        # Its checksums to come, step, score.
        self.background: tuple[Future[files.Entries], int, float | None] | None = None
        if resume:
            self.load_newest()
        else:
            forget(run, stage)

    def __enter__(self) -> Checkpoints:
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stop.__exit__()
        if kind is not None and issubclass(kind, RunError):  # else another rank may be gone
            self.finish()

    def after_step(self, log: MetricsLog, metrics: Mapping[str, float], guard: Guard) -> None:
        """A step of which something was skipped is never kept."""
        healthy = guard.step_is_over(self.stage, self.state.step)
        stop = parallel.any_true(self.stop.came)
        every = self.config.save_every
        due = bool(every) and self.state.step % every == 0
        saved = None
        if (due or stop) and healthy:
            self.refuse_runaways()
            log.sync()
            score = next((metrics[name] for name in self.config.best if name in metrics), None)
            saved = self.save(score)
        elif due or stop:
            say(f"{self.stage}: step {self.state.step} was skipped in part and is not kept")
        elif self.background and parallel.all_true(self.background[0].done()):
            self.finish()
        if stop:
            self.finish()
            newest = f"; checkpoint at {saved}" if saved else ""
            raise Stopped(
                f"stopped by SIGTERM after step {self.state.step} of {self.stage}{newest}. "
                "--resume goes on"
            )

    def refuse_runaways(self) -> None:
        """Weights that are not finite, or absurd, never come back, and are not worth keeping."""
        if not self.state.is_finite():
            there = sorted(steps_in(self.folder))
            kept = (
                f"newest checkpoint is of step {there[-1]}" if there else "there is no checkpoint"
            )
            raise Diverged(
                f"{self.stage}: step {self.state.step}: the weights have run away; {kept}. Lower "
                "the learning rate, and go on with --resume"
            )

    def end(self) -> None:
        """The stage is over and its model saved: resuming has nothing to do here."""
        self.finish()
        mark_finished(self.folder, self.state.step)

    # --- writing ---

    def save(self, score: float | None = None) -> Path:
        """Write one for the current step; `score` decides which is the best."""
        self.finish()
        step, aside = self.state.step, self._aside(self.state.step)
        with self._one_clear_error(step):
            if parallel.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(".step_*"):  # by a run that was killed
                    shutil.rmtree(left)
                aside.mkdir()
        state = flat({**self.state.state_dict(), "random": self.random.state_dict()})
        with self._one_clear_error(step):
            writer = dcp.FileSystemWriter(aside, sync_files=True)
            if self.config.async_save:
                group = parallel.cpu_group("checkpoints")
                future: Any = dcp.async_save(
                    state, storage_writer=writer, process_group=group, no_dist=_alone()
                )
                self.background = (self.threads.submit(_written, aside, future), step, score)
            else:
                dcp.save(state, storage_writer=writer, no_dist=_alone())
                self._commit(_written(aside), step, score)
        return self.folder / f"step_{step}"

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        if self.background is None:
            return
        (future, step, score), self.background = self.background, None
        with self._one_clear_error(step):
            self._commit(future.result(), step, score)

    def _aside(self, step: int) -> Path:
        return self.folder / f".step_{step}"

    def _commit(self, mine: files.Entries, step: int, score: float | None) -> None:
        """Manifest, rename, and only then the removal of what is too old."""
        aside = self._aside(step)
        theirs = {k: v for part in parallel.gather_objects(mine) for k, v in part.items()}
        if parallel.is_main():
            unknown = set(files.names_in(aside)) ^ theirs.keys()
            assert not unknown, f"written by nobody: {unknown}"
            ranks = parallel.world_size()
            about = {"stage": self.stage, "step": step, "ranks": ranks, "score": score}
            if self.state.base:
                about["base"] = self.state.base
            files.seal(aside, theirs, **about)
            final = self.folder / f"step_{step}"
            files.remove(final)  # one that was found damaged
            aside.rename(final)
            files.sync_folder(self.folder)
            self._prune()
        parallel.barrier()

    def _prune(self) -> None:
        """Keep the newest `keep_last`, and the one with the best score."""
        there = steps_in(self.folder)
        scores = {step: files.manifest(path).get("score") for step, path in there.items()}
        scores = {step: score for step, score in scores.items() if isinstance(score, int | float)}
        kept = {*sorted(there)[-self.config.keep_last :]}
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        for step, path in there.items():
            if step not in kept:
                files.remove(path)

    def _one_clear_error(self, step: int) -> _OneClearError:
        return _OneClearError(self.folder, step, self._aside(step))

    # --- reading ---

    def load_newest(self) -> None:
        """The newest whole one; a damaged one is told and passed over."""
        for path in [each for _, each in sorted(steps_in(self.folder).items(), reverse=True)]:
            if files.is_older(path):
                raise CheckpointError(
                    f"{path}: older versions kept pickles in their checkpoints, which are not "
                    "read: go on with the version that wrote it, or start again"
                )
            if problem := _problem(path):
                say(f"{self.stage}: checkpoint {path} is damaged ({problem}) and passed over")
                continue
            self._load(path)
            say(f"{self.stage}: goes on from {path}")
            return
        say(f"{self.stage}: no checkpoint in {self.folder}; starts from the beginning")

    def _load(self, path: Path) -> None:
        self._refuse_other_base(path)
        state = self.state.state_dict()
        same_ranks = files.manifest(path)["ranks"] == parallel.world_size()
        if same_ranks:
            state["random"] = self.random.state_dict()
        tensors = flat(state)
        try:
            there = read_index(path).state_dict_metadata.keys()
            # each rank has random states of its own
            differ = {n for n in tensors.keys() ^ there if not n.startswith("random/")}
            if differ:
                some = ", ".join(sorted(differ)[:3])
                raise CheckpointError(
                    f"{path} and this configuration differ in {len(differ)} entries ({some}): "
                    "resume with the settings that the run began with"
                )
            dcp.load(tensors, storage_reader=SafeReader(path), no_dist=_alone())
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"{path}: {_cause(error)}") from error
        except Unsafe as error:
            raise CheckpointError(f"{path}: {error}") from None
        state = filled(state, tensors)
        self.state.load_state_dict(state)
        if same_ranks:
            self.random.load_state_dict(state["random"])

    def _refuse_other_base(self, path: Path) -> None:
        said, ours = files.manifest(path).get("base"), self.state.base
        if said and ours and said[1] != ours[1]:
            raise CheckpointError(
                f"{path}: was trained on the weights {said[1]} of {said[0]}, and {ours[0]} has "
                f"{ours[1]} now: the base has changed. Put it back, or start again"
            )


class _OneClearError:
    """Whatever fails inside, on whichever rank, is one CheckpointError on all of them."""

    def __init__(self, folder: Path, step: int, aside: Path) -> None:
        self.folder, self.step, self.aside = folder, step, aside

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return
        problems = parallel.gather_objects(None if error is None else _cause(error))
        problem = next((each for each in problems if each is not None), None)
        if problem is None:
            return
        if parallel.is_main():
            shutil.rmtree(self.aside, ignore_errors=True)
        older = sorted(steps_in(self.folder))
        kept = f"the newest that is whole is step {older[-1]}" if older else "there is no older one"
        raise CheckpointError(
            f"checkpoint of step {self.step} could not be written to {self.folder}: {problem}; "
            f"{kept}"
        ) from error


def _written(aside: Path, saved: Any = None) -> files.Entries:
    """Checksums of what this rank has written, once it has; the main one's of what is nobody's."""
    if saved is not None:
        saved.result()
    rank = re.compile(r"__(\d+)_")  # so torch names them
    owners = {name: rank.match(name) for name in files.names_in(aside)}
    mine = [
        name for name, owner in owners.items() if (int(owner[1]) if owner else 0) == parallel.rank()
    ]
    return files.entries(aside, mine)


def _alone() -> bool:
    """A group of one is none here: torch would hand errors round in it, without their causes."""
    return parallel.world_size() == 1


def _cause(error: BaseException) -> str:
    """The first line of what really went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    seen: BaseException | None = error
    while seen is not None:  # torch wraps the operating system's error
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, agreed between ranks, which share the reading."""
    said = files.manifest(path)
    problem = files.problem(path, parallel.rank(), parallel.world_size())
    if said and not (type(said.get("step")) is int and type(said.get("ranks")) is int):
        problem = f"{files.MANIFEST} is missing or broken"
    return next((each for each in parallel.gather_objects(problem) if each), None)


def steps_in(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, whole or not."""
    found = {}
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and path.is_dir():
            found[int(number)] = path
    return found


def forget(run: RunFolder, stage: str) -> None:
    """What an earlier run of a stage has left, so that this one is not taken for its end."""
    if parallel.is_main():
        forget_here(run, stage)
    parallel.barrier()


def forget_here(run: RunFolder, stage: str) -> None:
    unmark(run.checkpoints(stage))
    files.remove(run.checkpoints(stage))


def mark_finished(folder: Path, steps: int) -> None:
    """For `finished`; in the checkpoints' folder of the stage."""
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / FINISHED, _mark(steps))
        files.sync_folder(folder.parent)


def _mark(steps: int) -> str:
    text = f"{steps}\n"
    return f"{text}{zlib.crc32(text.encode())}\n"


def unmark(folder: Path) -> None:
    """Before anything else that takes back what a stage has made."""
    if (folder / FINISHED).exists():
        (folder / FINISHED).unlink()
        files.sync_folder(folder)


def finished(run: RunFolder, stage: str, steps: int) -> bool:
    """Whether a stage of this many steps has left its model. A damaged mark is none: the stage goes
    on from its newest checkpoint and comes to the same end."""
    done = steps_done(run.checkpoints(stage))
    return done is not None and done >= steps


def steps_done(folder: Path) -> int | None:
    """What the mark says; None where there is none, or where it is damaged."""
    try:
        said = (folder / FINISHED).read_bytes()
        steps = int(said.partition(b"\n")[0])
        return steps if said == _mark(steps).encode() else None
    except (OSError, ValueError):
        return None
