"""A close look at a few steps: what ran when, and what memory it took.

<run>/profile/<stage>_step_<n>/trace.json     for chrome://tracing or ui.perfetto.dev
<run>/profile/<stage>_step_<n>/memory.csv     seconds, device, bytes allocated; and memory.png
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer import parallel
from trainer.config import Config
from trainer.runs.console import say
from trainer.runs.folder import RunFolder


@contextmanager
def profiled(config: Config, run: RunFolder, stage: str, step: int) -> Iterator[None]:
    """Around a step, counted from 1; does nothing but for the steps that are asked for."""
    asked = config.trainer.profile and step in config.trainer.profile_steps
    if not (asked and parallel.is_main()):
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if parallel.device().type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield
    folder = run.path / "profile" / f"{stage}_step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    rows = memory(json.loads((folder / "trace.json").read_text())["traceEvents"])
    with (folder / "memory.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "device", "bytes"), *rows])
    plot(rows, folder / "memory.png")
    say(f"{stage}: profile of step {step} in {folder}")


def memory(events: list[dict]) -> list[tuple[float, str, int]]:
    """(seconds since the first, device, bytes allocated) from the events of a trace."""
    found = [event for event in events if event.get("name") == "[memory]"]
    found.sort(key=lambda event: event["ts"])
    names = {0: "cpu", 1: "cuda"}  # c10's DeviceType
    return [
        (
            (event["ts"] - found[0]["ts"]) / 1e6,
            names.get(event["args"]["Device Type"], "other"),
            event["args"]["Total Allocated"],
        )
        for event in found
    ]


def plot(rows: list[tuple[float, str, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="MiB allocated")
    for device in dict.fromkeys(device for _, device, _ in rows):
        points = [(seconds, size / 2**20) for seconds, kind, size in rows if kind == device]
        axes.plot(*zip(*points), drawstyle="steps-post", label=device)
    axes.legend()
    figure.savefig(path)
