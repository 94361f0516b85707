"""Which examples make up a batch: pure functions of the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from trainer import parallel


def minibatches(
    count: int, parts: int, generator: torch.Generator, samples: int = 1
) -> Iterator[Tensor]:
    """A random split of 0..count-1 into `parts` nearly equal parts.

    `samples` neighbours, the answers to one prompt, stay together: they share its computation.
    On the CPU, as all indices are.
    """
    prompts = torch.randperm(count // samples, generator=generator)
    rows = prompts.unsqueeze(1) * samples + torch.arange(samples)
    for part in rows.tensor_split(parts):
        yield part.flatten()


@lru_cache(maxsize=4)
def _epoch(count: int, epoch: int, seed: tuple[object, ...]) -> Tensor:
    return torch.randperm(count, generator=parallel.generator("epoch", epoch, *seed))


def batch_indices(count: int, size: int, step: int, *seed: object) -> list[int]:
    """Which of `count` examples make up batch number `step`: every example once an epoch.

    A pure function of the step, so that a resumed run neither skips nor repeats data. Batches run
    over the end of an epoch into the next.
    """
    return in_order(count, range(step * size, (step + 1) * size), *seed)


def in_order(count: int, places: range, *seed: object) -> list[int]:
    """The examples at these places of an order that goes through all of them, epoch by epoch."""
    return [int(_epoch(count, place // count, seed)[place % count]) for place in places]
