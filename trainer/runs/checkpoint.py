"""Checkpoints that cannot be lost, and how a run goes on from one.

    checkpoints/<stage>/step_<n>/                  tensors, by torch.distributed.checkpoint
    checkpoints/<stage>/step_<n>/manifest.json     size and checksum of every file, written last

A checkpoint is written aside, flushed to the disk and renamed: a folder of this name was whole
once, and the manifest tells whether it still is. Nothing older is removed before the newer one is
in place. All that a stage's future depends on is in its `TrainState`: models, optimisers, what the
loop keeps between steps, and the global random generators of every rank, for a reward function may
use them. Data order, our own randomness and learning rates are functions of the step.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from trainer import parallel
from trainer.config import Config
from trainer.runs.console import say
from trainer.runs.faults import Guard, RunError, Stopped, StopSignal
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog

MANIFEST, FINISHED = "manifest.json", "finished"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant


class CheckpointError(RunError):
    """One line: which checkpoint, and why it could not be written or read."""


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


class TrainState:
    """state_dict() shares its tensors with the parts, and is loaded in place."""

    def __init__(
        self,
        models: dict[str, nn.Module | None],
        optimizers: dict[str, Stateful | None],
        others: dict[str, Stateful | None] | None = None,
    ) -> None:
        self.step = 0  # steps that are done
        self.models = {name: model for name, model in models.items() if model is not None}
        self.parts: dict[str, Stateful] = {}
        for kind, members in (("optimizer", optimizers), ("", others or {})):
            for name, part in members.items():
                if part is not None:
                    self.parts[f"{kind}.{name}" if kind else name] = part

    def state_dict(self) -> dict:
        weights = {f"model.{name}": _weights(model) for name, model in self.models.items()}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"step": self.step, **weights, **parts}

    def load_state_dict(self, state: dict) -> None:
        """Weights are in place already; see `state_dict`."""
        self.step = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def is_finite(self) -> bool:
        """On every rank, of every weight: what has diverged is not worth keeping."""
        weights = [w for model in self.models.values() for w in _weights(model).values()]
        local = [parallel.local(w) for w in weights if w.is_floating_point()]
        return parallel.all_true(all(bool(w.isfinite().all()) for w in local))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, tied ones once. Buffers that are not saved are functions of the configuration."""
    saved = model.state_dict(keep_vars=True)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights | {name: b for name, b in model.named_buffers() if name in saved}


class RandomStates:
    """Python's, NumPy's and torch's global generators on this rank."""

    def seed(self, *names: object) -> None:
        seed = parallel.generator(*names, parallel.rank()).initial_seed()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def state_dict(self) -> dict:
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state().numpy().tobytes(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
        return {f"rank_{parallel.rank()}": pickle.dumps(states)}

    def load_state_dict(self, state: dict) -> None:
        states = pickle.loads(state[f"rank_{parallel.rank()}"])
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(torch.frombuffer(bytearray(states["torch"]), dtype=torch.uint8))
        if "cuda" in states and torch.cuda.is_available():
            saved = torch.frombuffer(bytearray(states["cuda"]), dtype=torch.uint8)
            torch.cuda.set_rng_state(saved)


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
        self.background: tuple[Any, int, float | None] | None = None  # its future, step, score
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
        if (due or stop) and healthy and self.state.is_finite():
            log.sync()
            score = next((metrics[name] for name in self.config.best if name in metrics), None)
            saved = self.save(score)
        elif due or stop:
            say(f"{self.stage}: step {self.state.step} has diverged and is not kept")
        elif self.background and parallel.all_true(self.background[0].done()):
            self.finish()
        if stop:
            self.finish()
            newest = f"; checkpoint at {saved}" if saved else ""
            raise Stopped(
                f"stopped by SIGTERM after step {self.state.step} of {self.stage}{newest}. "
                "--resume goes on"
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
        state = _flat({**self.state.state_dict(), "random": self.random.state_dict()})
        with self._one_clear_error(step):
            writer = dcp.FileSystemWriter(aside, sync_files=True)
            if self.config.async_save:
                group = parallel.cpu_group("checkpoints")
                future = dcp.async_save(state, storage_writer=writer, process_group=group)
                self.background = (future, step, score)
            else:
                dcp.save(state, storage_writer=writer)
                self._commit(step, score)
        return self.folder / f"step_{step}"

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        if self.background is None:
            return
        (future, step, score), self.background = self.background, None
        with self._one_clear_error(step):
            future.result()
            self._commit(step, score)

    def _aside(self, step: int) -> Path:
        return self.folder / f".step_{step}"

    def _commit(self, step: int, score: float | None) -> None:
        """Checksums, manifest, rename, and only then the removal of what is too old."""
        aside = self._aside(step)
        parallel.barrier()  # every rank's files are there
        names = sorted(path.name for path in aside.iterdir())
        mine = names[parallel.rank() :: parallel.world_size()]
        files = {name: dict(zip(("bytes", "crc32"), _checksum(aside / name))) for name in mine}
        files = {
            name: each for part in parallel.gather_objects(files) for name, each in part.items()
        }
        if parallel.is_main():
            manifest = {
                "stage": self.stage,
                "step": step,
                "ranks": parallel.world_size(),
                "score": score,
                "files": files,
            }
            with (aside / MANIFEST).open("w") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(aside)
            final = self.folder / f"step_{step}"
            if final.exists():  # one that was found damaged
                self._remove(final)
            aside.rename(final)
            _sync_folder(self.folder)
            self._prune()
        parallel.barrier()

    def _prune(self) -> None:
        """Keep the newest `keep_last`, and the one with the best score."""
        there = steps_in(self.folder)
        scores = {step: _manifest(path).get("score") for step, path in there.items()}
        scores = {step: score for step, score in scores.items() if score is not None}
        kept = {*sorted(there)[-self.config.keep_last :]}
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        for step, path in there.items():
            if step not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Renamed first: a folder that is half removed must not look like a checkpoint."""
        away = path.rename(path.with_name(f".{path.name}_old"))
        shutil.rmtree(away)

    def _one_clear_error(self, step: int) -> _OneClearError:
        return _OneClearError(self.folder, step, self._aside(step))

    # --- reading ---

    def load_newest(self) -> None:
        """The newest whole one; a damaged one is told and passed over."""
        for path in [each for _, each in sorted(steps_in(self.folder).items(), reverse=True)]:
            if problem := _problem(path):
                say(f"{self.stage}: checkpoint {path} is damaged ({problem}) and passed over")
                continue
            self._load(path)
            say(f"{self.stage}: goes on from {path}")
            return
        say(f"{self.stage}: no checkpoint in {self.folder}; starts from the beginning")

    def _load(self, path: Path) -> None:
        state = self.state.state_dict()
        same_ranks = _manifest(path)["ranks"] == parallel.world_size()
        if same_ranks:
            state["random"] = self.random.state_dict()
        there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
        flat = _flat(state)
        # each rank has random states of its own
        differ = {name for name in flat.keys() ^ there if not name.startswith("random/")}
        if differ:
            some = ", ".join(sorted(differ)[:3])
            raise CheckpointError(
                f"{path} and this configuration differ in {len(differ)} entries ({some}): resume "
                "with the settings that the run began with"
            )
        try:
            dcp.load(flat, checkpoint_id=path)
        except CheckpointException as error:
            raise CheckpointError(f"{path}: {_cause(error)}") from error
        state = _filled(state, flat)
        self.state.load_state_dict(state)
        if same_ranks:
            self.random.load_state_dict(state["random"])


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


def _flat(state: dict, above: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    out: dict[str, Any] = {}
    for name, value in state.items():
        inner = f"{above}/{name}" if above else name
        out.update(_flat(value, inner) if isinstance(value, dict) else {inner: value})
    return out


def _filled(state: dict, flat: dict[str, Any], above: str = "") -> dict:
    """The nested `state` with the values of `flat`."""
    out = {}
    for name, value in state.items():
        inner = f"{above}/{name}" if above else name
        out[name] = _filled(value, flat, inner) if isinstance(value, dict) else flat[inner]
    return out


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


def _checksum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
        os.fsync(file.fileno())
    return size, crc


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(path: Path) -> dict:
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, agreed between ranks, which share the reading."""
    manifest = _manifest(path)
    problem = None
    if not manifest:
        problem = f"{MANIFEST} is missing or broken"
    files = sorted(manifest.get("files", {}).items())
    for name, want in files[parallel.rank() :: parallel.world_size()]:
        try:
            size = (path / name).stat().st_size
            if size != want["bytes"]:
                problem = f"{name} has {size} bytes, want {want['bytes']}"
            elif _checksum(path / name)[1] != want["crc32"]:
                problem = f"{name} has another checksum"
        except OSError as error:
            problem = f"{name}: {error.strerror}"
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
        shutil.rmtree(run.checkpoints(stage), ignore_errors=True)
    parallel.barrier()


def mark_finished(folder: Path, steps: int) -> None:
    """For `finished`; in the checkpoints' folder of the stage."""
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).write_text(f"{steps}\n")


def finished(run: RunFolder, stage: str, steps: int) -> bool:
    """Whether a stage of this many steps has left its model."""
    try:
        return int((run.checkpoints(stage) / FINISHED).read_text()) >= steps
    except (OSError, ValueError):
        return False
