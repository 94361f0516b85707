"""Means over the updates of a step, and where its seconds went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer import parallel


class Averages:
    """Means over the updates of a step; what is added is already a global mean of its own."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = defaultdict(float)  # of the update that is under way
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Sums of one update, to which its micro-batches add: close it with `update`."""
        for name, value in values.items():
            self.open[f"{prefix}/{name}"] += value.detach() if torch.is_tensor(value) else value

    def update(self, prefix: str) -> None:
        self.counts[prefix] += 1
        for name in [name for name in self.open if name.startswith(f"{prefix}/")]:
            self.sums[name] += self.open.pop(name)

    def means(self) -> dict[str, float]:
        names = list(self.sums)
        if not names:
            return {}
        device = parallel.device()
        sums = [torch.as_tensor(self.sums[n], dtype=torch.float64, device=device) for n in names]
        totals = parallel.all_sum(torch.stack(sums)).tolist()
        return {n: t / self.counts[n.partition("/")[0]] for n, t in zip(names, totals)}


class Timer:
    """Seconds by phase; the phases of a step add up to the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            if parallel.device().type == "cuda":  # or a kernel's time goes to a later phase
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - began

    def metrics(self, tokens: int) -> dict[str, float]:
        whole = time.perf_counter() - self.start
        other = whole - sum(self.seconds.values())
        return {
            "perf/step_seconds": whole,
            "perf/tokens_per_second": tokens / whole,
            "perf/peak_memory_bytes": parallel.peak_memory_bytes(),
            **{f"timing/{phase}": seconds for phase, seconds in self.seconds.items()},
            "timing/other": other,
        }
