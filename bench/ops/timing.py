"""Times of several functions, run in turns so that a busy or throttling machine is fair to all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Larger than any GPU's second-level cache (H200: 50 MiB, B200: 126 MiB).
FLUSH_BYTES = 256 << 20
CLOCK = 2e9  # cycles a second that torch.cuda._sleep counts, about
LEAST_HEAD_START = 2e-4


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
    """Seconds of one call: CUDA events on a GPU, behind a flushed cache, else a wall clock.

    The cache is flushed by reading: what a fill leaves dirty would be written back in the time of
    the call. Then the GPU sleeps while the CPU enqueues the call, so that its kernels follow one
    another and a call of microseconds is not timed as the Python before it; a call that waits for
    the GPU halfway is measured with that wait, as it is in use.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            self.sink = torch.empty((), dtype=torch.int32, device=device)

    def __call__(self, fn: Callable[[], object], head_start: float = 0.0) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.amax(self.buffer, dim=(), out=self.sink)
        torch.cuda._sleep(int(CLOCK * max(head_start, LEAST_HEAD_START)))
        before.record()
        fn()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000


def enqueueing(fn: Callable[[], object], device: torch.device) -> float:
    """Seconds that the CPU takes for a call, at most 20 ms: the head start that it needs."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return min(1.5 * taken, 0.02)


def interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    at_least: int = 5,
    at_most: int = 100,
    fails: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """About `seconds` for each function: one call of each, round after round.

    The order is turned round after every round, so that nobody always runs after the same one.
    Each is expected to have been called before, so that nothing is compiled here. A function that
    raises (out of memory beside the others, say) is told to `fails` and leaves; without `fails` it
    ends the run.
    """
    watch = Stopwatch(device)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gone: set[str] = set()
    head_start: dict[str, float] = {}

    def call(name: str) -> None:
        try:
            if name not in head_start:
                head_start[name] = enqueueing(functions[name], device)
            samples[name].append(watch(functions[name], head_start[name]))
        except Exception as error:
            if fails is None:
                raise
            gone.add(name)
            fails(name, error)
        if name in gone:  # here, where no traceback holds its tensors any more
            release(device)

    for name in functions:
        call(name)
    rounds = {
        name: min(at_most, max(at_least, int(seconds / max(taken[0], 1e-9))))
        for name, taken in samples.items()
        if name not in gone
    }
    for index in range(max(rounds.values(), default=0)):
        names = [name for name in rounds if index < rounds[name]]
        for name in names if index % 2 else reversed(names):
            if name not in gone:
                call(name)
    # The first call found the caches of its predecessor; it only decided how many follow.
    return {name: quantiles(samples[name][1:]) for name in functions if name not in gone}


def release(device: torch.device) -> None:
    """Gives back what a call that failed has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def waits_for_the_gpu(fn: Callable[[], object]) -> bool:
    """Found out by PyTorch before a capture does: one that fails halfway leaves the allocator in
    the belief that it goes on."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    except Exception:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def replayed(fn: Callable[[], object], device: torch.device, calls: int = 20) -> float | None:
    """Seconds of a call as a replayed CUDA graph: its kernels without any Python, caches warm.
    None where it cannot be captured (it waits for the GPU, or this is a CPU)."""
    if device.type != "cuda" or waits_for_the_gpu(fn):
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
    except Exception:
        return None
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda._sleep(int(CLOCK * LEAST_HEAD_START))
    before.record()
    for _ in range(calls):
        graph.replay()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000 / calls


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
