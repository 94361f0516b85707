"""What a person sees of a run on the terminal: progress, and a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer import parallel
from trainer.runs.names import printable

console = Console(highlight=False)


@contextmanager
def progress(stage: str, steps: int, start: int, enabled: bool) -> Iterator[Any]:
    """Yields show(figures): a bar with a few figures; in a log file, a line now and then."""
    began, every = time.perf_counter(), max(1, steps // 10)
    done = start
    if not parallel.is_main():
        yield lambda figures: None
        return
    if not (enabled and console.is_terminal):

        def show_line(figures: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            if enabled and (done % every == 0 or done == steps):
                seconds = time.perf_counter() - began
                print(f"{stage} {done}/{steps} {_figures(figures)} {seconds:.0f}s", flush=True)

        yield show_line
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
        yield lambda figures: bars.update(task, advance=1, figures=_figures(figures))


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {float(value):.3g}" for name, value in figures.items())


def say(what: RenderableType) -> None:
    if parallel.is_main():
        text = isinstance(what, str)  # where a domain may be called [red], or worse; tables escape
        what = printable(what) if isinstance(what, str) else what
        console.print(what, soft_wrap=True, markup=not text)
