"""The one training loop. A stage is its models and its step; checkpoints, logs, progress, skipped
steps, profiles, SIGTERM and resuming are the same for all, and are here.

    if not done(run, "sft", steps, resume):
        train(config, run, Sft(config, run), resume)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from trainer.config import Config
from trainer.runs import files, utilisation
from trainer.runs.checkpoint import Checkpoints, finished, steps_in
from trainer.runs.console import progress, say
from trainer.runs.faults import Diverged, Guard, Stopped
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.names import one_line
from trainer.runs.profiling import profiled
from trainer.runs.state import TrainState

Metrics = dict[str, float]
MODEL = {"sft": "sft", "rm": "rm", "ppo": "policy"}
"""What a stage leaves in models/."""


class Stage:
    """What differs from stage to stage."""

    name: str
    """Of its checkpoints and of its lines in metrics.jsonl."""
    streams: tuple[str, ...] = ()
    """Further names of lines that it writes."""
    steps: int
    state: TrainState
    """All that its future depends on."""
    guard: Guard

    def begin(self, log: MetricsLog) -> None:
        """Before the first step, of a resumed run too."""

    def step(self, step: int) -> Metrics:
        """One step, counted from 0."""
        raise NotImplementedError

    def headline(self, metrics: Metrics) -> Mapping[str, float]:
        """The few figures that the terminal shows."""
        raise NotImplementedError

    def look(self, log: MetricsLog) -> Metrics:
        """After a step has been logged: an evaluation, where one is due."""
        return {}

    def operations(self) -> float:
        """Floating-point operations a token of a step; 0: not known."""
        return sum(map(utilisation.training, self.state.models.values()))

    def save(self) -> None:
        """What the stage is for: its model."""
        raise NotImplementedError


def done(run: RunFolder, name: str, steps: int, resume: bool) -> bool:
    """Whether a run that goes on has this stage behind it."""
    if resume and finished(run, name, steps):
        files.refuse_damage(
            run.model(MODEL[name]),
            f"put back a copy, or do stage {name} and what follows it again, without --resume",
        )
        say(f"{name:<6} is done")
        return True
    return False


def log_of(config: Config, run: RunFolder, stages: tuple[str, ...], done: int) -> MetricsLog:
    return MetricsLog(run, stages, done, config.trainer.log, config.trainer.log_project)


def train(config: Config, run: RunFolder, stage: Stage, resume: bool) -> None:
    state, settings = stage.state, config.trainer
    peak = utilisation.peak_here(config.model.dtype)
    operations = stage.operations() if peak else 0.0
    with (
        Checkpoints(config, run, stage.name, state, resume) as checkpoints,
        log_of(config, run, (stage.name, *stage.streams), state.step) as log,
        progress(
            stage.name, stage.steps, state.step, settings.progress, settings.progress_seconds
        ) as show,
    ):
        with blame_divergence(run, stage):
            stage.begin(log)
            while state.step < stage.steps:
                with profiled(config, run, stage.name, state.step + 1):
                    metrics = stage.step(state.step)
                state.step += 1
                metrics["guard/skipped"] = stage.guard.skipped
                speed = metrics.get("perf/tokens_per_second", 0.0)
                if (used := utilisation.mfu(operations, speed, peak)) is not None:
                    metrics["perf/mfu"] = used
                log.write(stage.name, state.step, metrics)
                show(stage.headline(metrics), metrics)
                metrics |= stage.look(log)
                checkpoints.after_step(log, metrics, stage.guard)
        checkpoints.refuse_runaways()
        stage.save()
        checkpoints.end()


@contextlib.contextmanager
def blame_divergence(run: RunFolder, stage: Stage) -> Iterator[None]:
    """Weights that have run away break something, somewhere else each time: an index, a sampler,
    a comparison with the engine. Whatever it was, that they have is what there is to say."""
    try:
        yield
    except (Stopped, Diverged):
        raise
    except Exception as error:
        if not stage.state.ran_away():
            raise
        there = sorted(steps_in(run.checkpoints(stage.name)))
        kept = (
            f"the newest checkpoint is of step {there[-1]}" if there else "there is no checkpoint"
        )
        raise Diverged(
            f"{stage.name}: step {stage.state.step + 1}: the weights have run away "
            f"({one_line(f'{type(error).__name__}: {error}', 160)}); {kept}. Lower the learning "
            "rate, and go on with --resume"
        ) from error
