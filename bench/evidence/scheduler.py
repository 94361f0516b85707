"""What runs next, in as many processes as asked for, until everything asked for is there.

The order is fixed: for each arm, first what it stands on (SFT, reward model, the arm that gives its
KL coefficient), then itself. Nothing is lost by a kill but the runs under way, which start again:
a result is a file that is either whole or not there, and everything else is found out anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from bench.evidence.matrix import ARMS, Arm
from bench.evidence.store import Settings, Store, settings_of, short_hash
from bench.evidence.worker import Task, carry_out
from bench.evidence.worlds import WORLDS
from trainer import config as settings
from trainer.config import Config

PRELOADED = [
    "bench.evidence.worker",
    "bench.evidence.disturb",
    "trainer.__main__",
    *(f"trainer.stages.{name}" for name in ("sft", "reward_model", "policy", "evaluate")),
    "trainer.cli.begin",
]
"""Imported once, by the server from which every run's process is forked: that saves seconds, and a
file that is edited meanwhile changes no run of this study."""
PRIVATE = ("baselines={}", "run.threads=1", "trainer.save_every=0")


class StudyError(ValueError):
    """One line: what is wrong with what was asked for."""


@dataclass(frozen=True)
class Step:
    """Something to be done for an arm in a seed: a stage that it stands on, or itself."""

    kind: str  # sft, rm, ppo, evaluate
    name: str
    seed: int
    config: Config
    settings: Settings
    disturb: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> str:
        return short_hash(self.settings)


class Study:
    """Which results there are and which step is missing, of arms and seeds."""

    def __init__(self, store: Store, extra: Sequence[str] = ()) -> None:
        self.store, self.extra = store, tuple(extra)
        self.packaged: dict[str, Config] = {}
        self.of_world("toy")  # what is wrong in `extra` is wrong before anything runs
        self.found: dict[tuple[str, int], Path] = {}
        self.models: dict[tuple[str, str, int], Path] = {}

    def result(self, arm: str, seed: int) -> dict | None:
        if (arm, seed) not in self.found:
            self.missing(arm, seed)
        path = self.found.get((arm, seed))
        return self.store.records[path] if path else None

    def missing(self, name: str, seed: int) -> Step | None:
        """The first step that `name` in this seed still needs; None when its result is there."""
        if (name, seed) in self.found:
            return None
        arm = ARMS[name]
        for stage in self._stages(arm.world):
            step = self._model(stage, arm.world, seed)
            if step is not None:
                return step
        coefficient = ()
        if arm.coef_from:
            step = self.missing(arm.coef_from, seed)
            if step is not None:
                return step
            result = self.result(arm.coef_from, seed)
            coefficient = (f"kl.coef={mean_coefficient(result):.4f}",)
        step = self._policy(arm, seed, coefficient)
        path = self.store.find(step.settings)
        if path is None:
            return step
        self.found[name, seed] = path
        return None

    def _stages(self, world: str) -> tuple[str, ...]:
        """What PPO stands on; where rewards are functions there is no reward model."""
        return ("sft", "rm") if self.of_world(world).reward.model_weight else ("sft",)

    def _model(self, stage: str, world: str, seed: int) -> Step | None:
        there = WORLDS[world]
        seed = there.start_of(seed)
        if (stage, world, seed) in self.models:
            return None
        overrides = [*there.sft, *(there.rewards if stage == "rm" else ())]
        if stage == "rm":
            overrides.append(f"model.policy={self._models_of('sft', world, seed)}")
        # No groups: a reward model without ratings would be refused for what PPO does with it.
        config = self.load(seed, stage, [*overrides, "groups.inference=none"], world)
        step = Step(stage, f"{stage}_{world}", seed, config, settings_of(config, stage))
        path = self.store.find(step.settings)
        if path is None:
            return step
        self.models[stage, world, seed] = path.parent / "models" / stage
        return None

    def _models_of(self, stage: str, world: str, seed: int) -> Path:
        return self.models[stage, world, WORLDS[world].start_of(seed)].resolve()

    def _policy(self, arm: Arm, seed: int, coefficient: Sequence[str]) -> Step:
        world = WORLDS[arm.world]
        overrides = [
            *world.overrides,
            *arm.overrides,
            *coefficient,
            *(
                f"model.{'policy' if stage == 'sft' else 'reward'}="
                f"{self._models_of(stage, arm.world, seed)}"
                for stage in self._stages(arm.world)
            ),
        ]
        config = self.load(seed, "ppo", overrides, arm.world)
        made_by = settings_of(config, arm.kind, dict(arm.disturb))
        return Step(arm.kind, arm.name, seed, config, made_by, arm.disturb)

    def load(self, seed: int, stage: str, overrides: Sequence[str], world: str = "toy") -> Config:
        """A world of its own for each seed, so that no prompt of the tuning seeds comes back; but
        for worlds in which all start from one model."""
        own = (f"toy.seed={seed}",) if WORLDS[world].start is None else ()
        about = (f"run.seed={seed}", *own, f"run.stages=[{stage}]")
        return self.of_world(world).override([*about, *overrides])

    def of_world(self, world: str) -> Config:
        """Its packaged configuration, with what is asked for in addition."""
        name = WORLDS[world].config
        if name not in self.packaged:
            self.packaged[name] = settings.load(name, [*PRIVATE, *self.extra])
        return self.packaged[name]


def mean_coefficient(result: dict) -> float:
    """The mean KL coefficient while the policy moved."""
    still = result["settings"]["ppo.critic_warmup_steps"]
    used = [each for each in result["curves"]["objective/kl_coef"][still:] if each is not None]
    return statistics.fmean(used)


# --- running -------------------------------------------------------------------------------------


class Scheduler:
    def __init__(
        self, study: Study, wanted: Sequence[tuple[str, int]], workers: int, commit: str
    ) -> None:
        self.study, self.store = study, study.store
        self.wanted, self.workers, self.commit = list(wanted), workers, commit
        self.running: dict[str, tuple[Step, Task, Any]] = {}  # by the step's key
        self.failed: dict[str, Step] = {}
        self.finished = 0

    def run(self) -> dict[str, Step]:
        """Until nothing can be started any more; the steps that failed."""
        with alone_in(self.store.folder), terminated_as_interrupt():
            shutil.rmtree(self.store.folder / "running", ignore_errors=True)
            context = _processes()
            there = sum(self.study.missing(*each) is None for each in self.wanted)
            print(f"{there} of {len(self.wanted)} results are there", flush=True)
            self.began = time.time()
            try:
                while self._start(context) or self.running:
                    ended = wait([child.sentinel for _, _, child in self.running.values()])
                    for key, (_, _, child) in list(self.running.items()):
                        if child.sentinel in ended:
                            self._finish(key)
            finally:
                for _, _, child in self.running.values():
                    child.kill()
                    child.join()
        return self.failed

    def _start(self, context: BaseContext) -> bool:
        """Start what is ready, in order, while there is a free worker."""
        started = False
        for arm, seed in self.wanted:
            if len(self.running) >= self.workers:
                break
            step = self.study.missing(arm, seed)
            if step is None or step.key in self.running or step.key in self.failed:
                continue
            folder = self.store.run_folder(step.name, seed, step.settings)
            folder.mkdir(parents=True)
            task = Task(step.kind, folder, seed, step.disturb)
            task.config.write_text(_in_folder(step.config, folder).to_yaml())
            child = context.Process(target=carry_out, args=(task,))
            child.start()
            self.running[step.key] = (step, task, child)
            started = True
        return started

    def _finish(self, key: str) -> None:
        step, task, child = self.running.pop(key)
        child.join()
        if child.exitcode != 0 or not task.outcome.is_file():
            self.failed[key] = step
            kept = self.store.folder / "failed" / task.log.name
            kept.parent.mkdir(exist_ok=True)
            tail = task.log.read_text().splitlines()[-12:] if task.log.is_file() else []
            if task.log.is_file():
                task.log.replace(kept)
            shutil.rmtree(task.folder)
            shown = "\n    ".join(tail)
            print(
                f"FAILED {step.name} seed {step.seed}: code {child.exitcode}, {kept}:\n    {shown}",
                flush=True,
            )
            return
        outcome = json.loads(task.outcome.read_text())
        record = {
            "name": step.name,
            "seed": step.seed,
            "commit": self.commit,
            "settings": step.settings,
            **outcome,
        }
        if step.kind in ("sft", "rm"):
            folder = self.store.models_folder(step.name, step.seed, step.settings)
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            task.folder.rename(folder)
            self.store.keep(folder / "record.json", record)
        else:
            self.store.keep(self.store.result_file(step.name, step.seed, step.settings), record)
            shutil.rmtree(task.folder)
        task.log.unlink(missing_ok=True)
        self._tell(step, record)

    def _tell(self, step: Step, record: dict) -> None:
        self.finished += 1
        figures = ""
        if step.kind in ("ppo", "evaluate"):
            last = record["draws"][0]["metrics"]
            self.study.missing(step.name, step.seed)  # finds it
            figures = (
                f"  gold {last['eval/gold']:.3f}  worst domain {last['eval/worst_domain_gold']:.3f}"
            )
        todo = sum(each not in self.study.found for each in self.wanted)
        print(
            f"[{len(self.wanted) - todo}/{len(self.wanted)}] seed {step.seed} {step.name} "
            f"{record['seconds']:.0f} s{figures}  {self._left(todo)}",
            flush=True,
        )

    def _left(self, todo: int) -> str:
        seconds = (time.time() - self.began) / self.finished * todo
        return f"about {seconds / 60:.0f} min to go" if todo else "all there"


def _processes() -> BaseContext:
    """Forked from a server that has imported everything; but a fork of what has looked for a GPU
    cannot use it, so with a GPU each run imports for itself."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _in_folder(config: Config, folder: Path) -> Config:
    return config.override([f"run.output={folder.resolve()}"])


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"{folder}: another study is running in it") from None
        yield


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the study as Ctrl-C does: its runs are ended, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cores() -> int:
    there = getattr(os, "sched_getaffinity", None)
    return len(there(0)) if there else os.cpu_count() or 1
