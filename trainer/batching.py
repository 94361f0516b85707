"""Sequences padded on the right, and how a batch is cut into pieces that fit into memory.

With causal attention a pad token on the right is never seen by a real one, so no attention mask is
needed. S sequences, L padded tokens, T padded answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from trainer import parallel


@dataclass(frozen=True)
class Sequences:
    """Prompts followed by their answers."""

    tokens: Tensor  # (S, L) int64, padded on the right
    prompt_lengths: Tensor  # (S)
    lengths: Tensor  # (S) of prompt and answer together

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer_lengths(self) -> Tensor:  # (S)
        return self.lengths - self.prompt_lengths

    @property
    def mask(self) -> Tensor:
        """(S, T) bool: True at an answer's tokens, which start at column 0."""
        lengths = self.answer_lengths
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        return steps < lengths.unsqueeze(1)

    def rows(self, index: Tensor) -> Sequences:
        """Some of the sequences, without columns that none of them needs."""
        lengths = self.lengths[index]
        width = int(lengths.max())
        return Sequences(self.tokens[index, :width], self.prompt_lengths[index], lengths)

    def answers(self) -> list[list[int]]:
        return [
            row[start:end]
            for row, start, end in zip(
                self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist()
            )
        ]

    @staticmethod
    def of(prompts: list[list[int]], answers: list[list[int]], pad: int) -> Sequences:
        rows = [p + a for p, a in zip(prompts, answers)]
        width = max(map(len, rows))
        return Sequences(
            torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            torch.tensor([len(p) for p in prompts]),
            torch.tensor([len(row) for row in rows]),
        ).to(parallel.device())

    def to(self, device: torch.device) -> Sequences:
        return Sequences(
            self.tokens.to(device), self.prompt_lengths.to(device), self.lengths.to(device)
        )


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Indices cut into batches of at most `budget` padded tokens, longest sequences first.

    Sorted by length, so that padding is little and a budget that is too large fails at the start.
    A sequence longer than the budget goes alone.
    """
    order = lengths.argsort(descending=True, stable=True)
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def minibatches(count: int, parts: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random split of 0..count-1 into `parts` nearly equal parts."""
    yield from torch.randperm(count, generator=generator).to(parallel.device()).tensor_split(parts)


def forward_all(
    module: Callable[[Sequences], tuple[Tensor, ...]], sequences: Sequences, budget: int
) -> tuple[Tensor, ...]:
    """module(sequences) without gradients, in micro-batches, put together again.

    The module returns tensors (s, T) over answer tokens, or (s) or (s, M); T may be shorter for
    some micro-batches, and what they leave out is padding.
    """
    with torch.no_grad():
        pieces = [
            (rows, module(sequences.rows(rows)))
            for rows in micro_batches(sequences.lengths, budget)
        ]
        outputs = []
        for column in zip(*(parts for _, parts in pieces)):
            widest = max(column, key=lambda part: part.shape[1] if part.dim() > 1 else 0)
            out = widest.new_zeros(len(sequences), *widest.shape[1:])
            for (rows, _), part in zip(pieces, column):
                if part.dim() > 1:
                    out[rows, : part.shape[1]] = part
                else:
                    out[rows] = part
            outputs.append(out)
    return tuple(outputs)


@lru_cache(maxsize=4)
def _epoch(count: int, epoch: int, seed: tuple) -> Tensor:
    return torch.randperm(count, generator=parallel.generator("epoch", epoch, *seed))


def batch_indices(count: int, size: int, step: int, *seed: object) -> list[int]:
    """Which of `count` examples make up batch number `step`: every example once an epoch.

    A pure function of the step, so that a resumed run neither skips nor repeats data. Batches run
    over the end of an epoch into the next.
    """
    places = range(step * size, (step + 1) * size)
    return [int(_epoch(count, place // count, seed)[place % count]) for place in places]
