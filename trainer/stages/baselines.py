"""Further PPO runs beside the main one: same SFT and reward model, same seed, other settings.

On a CPU they run at the same time, in processes with a share of the cores each. On GPUs, and on
several ranks, they run one after another in the process of the main run, when that is done and its
models are freed: a second process would find the card full. Each is a whole run folder below
<output>/baselines/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer import parallel
from trainer.config import Config
from trainer.models import sources
from trainer.ppo import loop
from trainer.runs import children, files
from trainer.runs.console import say
from trainer.runs.faults import RunError, Stopped, StopSignal
from trainer.runs.folder import RunFolder
from trainer.runs.names import one_line


@contextmanager
def running(config: Config, run: RunFolder, resume: bool = False) -> Iterator[None]:
    """The main run's PPO goes inside; on leaving, all baselines have ended."""
    waiting = list(config.baselines)
    if not waiting:
        yield
        return
    if not beside():
        yield
        for name in waiting:
            say(f"ppo    baseline {name}")
            _run_here(config, run, name, resume)
        return
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = here or 1
    at_once = min(len(waiting), cores - 1)
    threads = max(1, cores // (at_once + 1))
    before = torch.get_num_threads()
    started: dict[str, subprocess.Popen] = {}
    try:
        for _ in range(at_once):
            name = waiting.pop(0)
            started[name] = _start(config, run, name, threads, resume)
        if at_once:
            torch.set_num_threads(threads)
        yield
        torch.set_num_threads(before)
        with StopSignal() as stop:
            while started or waiting:
                if not started:
                    name = waiting.pop(0)
                    started[name] = _start(config, run, name, cores, resume)
                name, process = next(iter(started.items()))
                say(f"ppo    waiting for baseline {name}")
                _finish(run, name, process, stop)
                del started[name]
    finally:
        torch.set_num_threads(before)
        for process in started.values():
            process.terminate()  # each leaves a checkpoint, and we wait for it
        for process in started.values():
            process.wait()


def beside() -> bool:
    """Whether baselines have processes of their own."""
    return parallel.world_size() == 1 and parallel.device().type == "cpu"


def _run_here(config: Config, run: RunFolder, name: str, resume: bool) -> None:
    gc.collect()  # models of the run before, which their hooks hold in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    inner, folder = _inner(config, run, name, config.run.threads), run.baseline(name)
    if parallel.is_main():
        folder.path.mkdir(parents=True, exist_ok=True)
        files.write(folder.config, inner.to_yaml())
    parallel.barrier()
    loop.run(inner, folder, resume)


def _start(
    config: Config, run: RunFolder, name: str, threads: int, resume: bool
) -> subprocess.Popen:
    """As a command of its own, which checks, locks and writes its folder by itself."""
    folder = run.baseline(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    asked = folder.path / "asked.yaml"
    files.write(asked, _inner(config, run, name, threads).to_yaml())
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    words = ["ppo", str(asked), *(["--resume"] if resume else [])]
    return children.start(words, folder.log_file(), resume, environment)


def _finish(run: RunFolder, name: str, process: subprocess.Popen, stop: StopSignal) -> None:
    while process.poll() is None:
        if stop.came:
            raise Stopped(f"stopped by SIGTERM while baseline {name} ran. --resume goes on")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    if process.returncode != 0:
        log = run.baseline(name).log_file()
        said = log.read_text(errors="replace").splitlines() or ["nothing was said"]
        raise RunError(
            f"baseline {name} failed with code {process.returncode}: {one_line(said[-1], 300)} "
            f"({log})"
        )


def _inner(config: Config, run: RunFolder, name: str, threads: int) -> Config:
    inner = config.baseline(name)
    output = str(run.baseline(name).path)
    return dataclasses.replace(
        inner,
        run=dataclasses.replace(inner.run, stages=("ppo",), output=output, threads=threads),
        groups=dataclasses.replace(
            inner.groups,
            reference_cache=inner.groups.reference_cache or str(run.path / "reference_scores"),
        ),
        model=dataclasses.replace(
            inner.model,
            policy=sources.policy_source(config, run),
            reward=sources.reward_source(config, run) if config.reward.model_weight else "",
        ),
    )
