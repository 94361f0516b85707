"""Which examples make up a batch: pure functions of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
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


@lru_cache(maxsize=64)
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
    out: list[int] = []
    at = places.start
    while at < places.stop:
        epoch, first = divmod(at, count)
        some = _epoch(count, epoch, seed)[first : first + places.stop - at]
        out += some.tolist()
        at += len(some)
    return out


BLOCK = 4096
"""Places whose sources are drawn together."""


@dataclass(frozen=True)
class Mixture:
    """Examples of several sources, which batches have in the proportion of their weights, however
    many there are of each: within a source every example once before any comes again."""

    members: tuple[tuple[int, ...], ...]
    """Of each source, the places of its examples."""
    weights: tuple[float, ...]

    @staticmethod
    def of(sources: Sequence[int], weights: Sequence[float]) -> Mixture:
        """From the number of each example's source."""
        members: list[list[int]] = [[] for _ in weights]
        for place, source in enumerate(sources):
            members[source].append(place)
        return Mixture(tuple(map(tuple, members)), tuple(weights))

    def take(self, chosen: Sequence[int]) -> Mixture:
        """The mixture of some of the examples, in this order."""
        of = {place: source for source, some in enumerate(self.members) for place in some}
        return Mixture.of([of[place] for place in chosen], self.weights)

    def batch(self, size: int, step: int, *seed: object) -> list[int]:
        """Like `batch_indices`: a pure function of the step."""
        return self.in_order(range(step * size, (step + 1) * size), *seed)

    def in_order(self, places: range, *seed: object) -> list[int]:
        """The examples at these places of the order that batches follow."""
        there = [source for source, some in enumerate(self.members) if some]
        weights = tuple(self.weights[source] for source in there)
        out = []
        for place in places:
            block, inside = divmod(place, BLOCK)
            which = int(_sources(weights, block, seed)[inside])
            before = _before(weights, block, seed)[which]
            nth = before + int((_sources(weights, block, seed)[:inside] == which).sum())
            some = self.members[there[which]]
            epoch, at = divmod(nth, len(some))
            out.append(some[int(_epoch(len(some), epoch, (*seed, "source", there[which]))[at])])
        return out


@lru_cache(maxsize=16)
def _sources(weights: tuple[float, ...], block: int, seed: tuple[object, ...]) -> Tensor:  # (BLOCK)
    shares = torch.tensor(weights, dtype=torch.float64)
    draws = torch.rand(
        BLOCK, dtype=torch.float64, generator=parallel.generator("mixture", block, *seed)
    )
    edges = (shares / shares.sum()).cumsum(0)[:-1]
    return torch.bucketize(draws, edges, right=True)


_counts: dict[tuple[object, ...], list[list[int]]] = {}


def _before(weights: tuple[float, ...], block: int, seed: tuple[object, ...]) -> list[int]:
    """How often each source was drawn in all earlier blocks."""
    sums = _counts.setdefault((weights, seed), [[0] * len(weights)])
    while len(sums) <= block:
        drawn = _sources(weights, len(sums) - 1, seed).bincount(minlength=len(weights))
        sums.append([a + b for a, b in zip(sums[-1], drawn.tolist())])
    return sums[block]


def batch_of(examples: Sized, size: int, step: int, *seed: object) -> list[int]:
    """Places of a batch's examples: by the weights of their sources, where they have several."""
    return order_of(examples, range(step * size, (step + 1) * size), *seed)


def order_of(examples: Sized, places: range, *seed: object) -> list[int]:
    """The examples at these places of the order that batches follow."""
    mixture: Mixture | None = getattr(examples, "mixture", None)
    if mixture is None:
        return in_order(len(examples), places, *seed)
    return mixture.in_order(places, *seed)
