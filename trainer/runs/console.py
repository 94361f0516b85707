"""What a person sees of a run on the terminal: progress, and a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer import parallel
from trainer.runs.names import printable

console = Console(highlight=False)


@contextmanager
def progress(
    stage: str, steps: int, start: int, enabled: bool, every: float = 0.0
) -> Iterator[Callable[[Mapping[str, float], Mapping[str, float]], None]]:
    """Yields show(figures, metrics), to be called after each step: a bar with a few figures and the
    speed; where there is no terminal a line after the first step and the last, and every so many
    seconds between them."""
    if not (enabled and parallel.is_main()):
        yield lambda figures, metrics: None
        return
    if not console.is_terminal:
        yield Lines(stage, steps, start, every).show
        return
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(stage, total=steps, completed=start, figures="")

        def show(figures: Mapping[str, float], metrics: Mapping[str, float]) -> None:
            shown = "  ".join([_figures(figures), *_speed(metrics)])
            bars.update(task, advance=1, figures=shown)

        yield show


class Lines:
    """`ppo 12/80  score 0.51  kl 0.3  3,204 tokens/s  MFU 41 %  8.4 s a step  9 min left`"""

    def __init__(self, stage: str, steps: int, start: int, every: float) -> None:
        self.stage, self.steps, self.start, self.every = stage, steps, start, every
        self.done, self.began, self.said = start, time.monotonic(), -math.inf

    def show(self, figures: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        self.done, now = self.done + 1, time.monotonic()
        if self.done < self.steps and now - self.said < self.every:
            return
        self.said = now
        each = (now - self.began) / (self.done - self.start)
        left = duration(each * (self.steps - self.done))
        end = f"{left} left" if self.done < self.steps else f"done in {duration(now - self.began)}"
        parts = [_figures(figures), *_speed(metrics), f"{each:.3g} s a step", end]
        said = "  ".join(part for part in parts if part)
        print(f"{self.stage} {self.done}/{self.steps}  {said}", flush=True)


def duration(seconds: float) -> str:
    """In two digits or so, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _speed(metrics: Mapping[str, float]) -> list[str]:
    tokens, used = metrics.get("perf/tokens_per_second"), metrics.get("perf/mfu")
    said = [] if tokens is None else [f"{tokens:,.0f} tokens/s"]
    return said if used is None else [*said, f"MFU {used:.0%}"]


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {float(value):.3g}" for name, value in figures.items())


def say(what: RenderableType) -> None:
    if parallel.is_main():
        text = isinstance(what, str)  # where a domain may be called [red], or worse; tables escape
        what = printable(what) if isinstance(what, str) else what
        console.print(what, soft_wrap=True, markup=not text)
