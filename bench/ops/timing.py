"""Times of several functions, run in turns so that a busy or throttling machine is fair to all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Larger than any GPU's second-level cache (H200: 50 MiB, B200: 126 MiB).
FLUSH_BYTES = 256 << 20


class Times(NamedTuple):
    """Seconds of one call: median, 20 % and 80 % quantiles, and how many calls."""

    median: float
    low: float
    high: float
    calls: int


def quantiles(samples: list[float]) -> Times:
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), fifths[0], fifths[3], len(samples))


class Stopwatch:
    """Seconds of one call: CUDA events on a GPU, behind a flushed cache, else a wall clock."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, fn: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        before.record()
        fn()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    at_least: int = 5,
    at_most: int = 100,
) -> dict[str, Times]:
    """About `seconds` for each function: one call of each, round after round.

    The order is turned round after every round, so that nobody always runs after the same one.
    Each is expected to have been called before, so that nothing is compiled here.
    """
    watch = Stopwatch(device)
    samples: dict[str, list[float]] = {name: [watch(fn)] for name, fn in functions.items()}
    rounds = {
        name: min(at_most, max(at_least, int(seconds / max(taken[0], 1e-9))))
        for name, taken in samples.items()
    }
    for index in range(max(rounds.values(), default=0)):
        names = [name for name in functions if index < rounds[name]]
        for name in names if index % 2 else reversed(names):
            samples[name].append(watch(functions[name]))
    # The first call found the caches of its predecessor; it only decided how many follow.
    return {name: quantiles(taken[1:]) for name, taken in samples.items()}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
