"""Sequences in one row of tokens, without padding, and how they are cut to fit into memory.

Lengths and tokens live on the CPU, where they come from: whatever is an index is made there, and
a device is never asked how long something is. What models say of answers is flat: one number for
each answer token, sequence after sequence, (n) in all. S sequences, N tokens.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import parallel

ENOUGH_FOR_A_CPU = 1024
"""Tokens. Measured on the toy model, answers of 1 to 12 tokens, milliseconds a forward / forward
and backward of 128 sequences: 52 / 147 in one batch, 38 / 117 like this, 40 / 113 at 256."""


@dataclass(frozen=True)
class Sequences:
    """Prompts followed by their answers, one sequence after another."""

    tokens: Tensor  # (N) int64; like the others on the CPU
    prompt_lengths: Tensor  # (S)
    lengths: Tensor  # (S) of prompt and answer together
    prompt_of: Tensor | None = None  # (S): equal numbers, equal prompts; None: nothing to share

    @staticmethod
    def of(
        prompts: Sequence[list[int]], answers: Sequence[list[int]], shared: bool = False
    ) -> Sequences:
        """`shared`: several answers to a prompt, which models then compute once."""
        rows = [p + a for p, a in zip(prompts, answers)]
        names = {key: i for i, key in enumerate(dict.fromkeys(map(tuple, prompts)))}
        return Sequences(
            torch.tensor([token for row in rows for token in row], dtype=torch.long),
            torch.tensor([len(p) for p in prompts], dtype=torch.long),
            torch.tensor([len(row) for row in rows], dtype=torch.long),
            torch.tensor([names[tuple(p)] for p in prompts]) if shared else None,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Tensor:  # (S + 1)
        return F.pad(self.lengths.cumsum(0), (1, 0))

    @cached_property
    def answer_lengths(self) -> Tensor:  # (S)
        return self.lengths - self.prompt_lengths

    @cached_property
    def answer_starts(self) -> Tensor:  # (S + 1): where each answer begins among the flat ones
        return F.pad(self.answer_lengths.cumsum(0), (1, 0))

    @property
    def count(self) -> int:
        """n: answer tokens."""
        return int(self.answer_starts[-1])

    @cached_property
    def answer_places(self) -> Tensor:  # (n) of the answers' tokens in `tokens`
        return ranges(self.starts[:-1] + self.prompt_lengths, self.answer_lengths)

    @cached_property
    def cu_answers(self) -> Tensor:  # (S + 1) int32, on the device
        return on_device(self.answer_starts.int())

    @cached_property
    def sequence_of(self) -> Tensor:  # (n) on the device: whose token it is
        return on_device(torch.arange(len(self)).repeat_interleave(self.answer_lengths))

    @cached_property
    def answer_tokens(self) -> Tensor:  # (n) on the device
        return on_device(self.tokens[self.answer_places])

    def answers(self) -> list[list[int]]:
        flat = self.tokens[self.answer_places].tolist()
        bounds = self.answer_starts.tolist()
        return [flat[a:b] for a, b in itertools.pairwise(bounds)]

    def prompts(self) -> list[list[int]]:
        flat = self.tokens.tolist()
        starts, lengths = self.starts.tolist(), self.prompt_lengths.tolist()
        return [flat[a : a + n] for a, n in zip(starts, lengths)]

    def rows(self, index: Tensor) -> Sequences:
        """Some of the sequences, in this order."""
        lengths = self.lengths[index]
        return Sequences(
            self.tokens[ranges(self.starts[index], lengths)],
            self.prompt_lengths[index],
            lengths,
            None if self.prompt_of is None else self.prompt_of[index],
        )

    @staticmethod
    def joined(parts: Sequence[Sequences]) -> Sequences:
        """One after another; prompts are shared within each."""
        first, shared = [0], [part.prompt_of for part in parts if part.prompt_of is not None]
        for names in shared:
            first.append(first[-1] + int(names.max()) + 1)
        return Sequences(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([names + at for names, at in zip(shared, first)]) if shared else None,
        )

    def flat(self, index: Tensor) -> Tensor:
        """Where the answer tokens of some sequences stand among all flat ones; on the device."""
        return on_device(self.places(index))

    def places(self, index: Tensor) -> Tensor:
        """The same, on the CPU."""
        return ranges(self.answer_starts[index], self.answer_lengths[index])

    def sums(self, flat: Tensor) -> Tensor:
        """(n) -> (S): over each answer."""
        return torch.segment_reduce(flat, "sum", offsets=self.cu_answers.long(), initial=0)

    def padded(self, flat: Tensor) -> Tensor:
        """(n) -> (S, T), zeros behind each answer: for what looks at whole answers."""
        steps = torch.arange(int(self.answer_lengths.max())) < self.answer_lengths.unsqueeze(1)
        inside = on_device(steps)
        return flat.new_zeros(inside.shape).masked_scatter(inside, flat)

    @cached_property
    def units(self) -> list[list[int]]:
        """Rows that are computed together: the answers to one prompt."""
        if self.prompt_of is None:
            return [[i] for i in range(len(self))]
        together: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompt_of.tolist()):
            together.setdefault(prompt, []).append(i)
        return list(together.values())

    @cached_property
    def unit_of(self) -> Tensor:  # (S): the number of each row's unit
        of = [0] * len(self)
        for number, rows in enumerate(self.units):
            for row in rows:
                of[row] = number
        return torch.tensor(of)

    def pieces(self, budget: int) -> list[Piece]:
        """This rank's micro-batches of at most `budget` tokens; see `pieces`."""
        lengths, asked = self.lengths.tolist(), self.prompt_lengths.tolist()
        if self.prompt_of is None:
            costs = lengths
        else:
            costs = [
                asked[rows[0]] + sum(lengths[i] - asked[i] for i in rows) for rows in self.units
            ]
        return [
            Piece(torch.tensor([i for unit in piece.rows.tolist() for i in self.units[unit]]), w)
            for piece, w in ((piece, piece.weight) for piece in pieces(costs, budget))
        ]


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start_0, start_0 + 1, ... for length_0 numbers, then start_1 ...; on the CPU."""
    ends = lengths.cumsum(0)
    shift = starts - ends + lengths
    return torch.arange(int(ends[-1]) if len(ends) else 0) + shift.repeat_interleave(lengths)


def on_device(x: Tensor) -> Tensor:
    """From the CPU, without waiting for anything."""
    return x.to(parallel.device(), non_blocking=True)


def micro_batches(costs: Sequence[int], budget: int) -> list[Tensor]:
    """Places cut into batches whose costs come to at most `budget`, the largest first.

    Sorted, so that like lengths meet and a budget that is too large fails at the start. What costs
    more than the budget goes alone. A CPU computes small batches as fast as large ones, so there
    ENOUGH_FOR_A_CPU tokens make a batch.
    """
    if parallel.device().type == "cpu":
        budget = min(budget, ENOUGH_FOR_A_CPU)
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if costs[i] > room or not batches:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= costs[i]
    return [torch.tensor(batch) for batch in batches]


class Piece(NamedTuple):
    rows: Tensor
    weight: int  # 1; or 0 for what only keeps the other ranks company


def pieces(costs: Sequence[int], budget: int) -> list[Piece]:
    """This rank's micro-batches. Every rank has equally many, for each forward and backward of a
    sharded model is a collective: a rank that runs out computes on a sequence of another's with
    weight 0."""
    ranks = parallel.world_size()
    if ranks == 1:
        return [Piece(rows, 1) for rows in micro_batches(costs, budget)]
    cut = []
    for rows in shares(costs, ranks):
        here = torch.tensor(rows, dtype=torch.long)
        cut.append([here[some] for some in micro_batches([costs[i] for i in rows], budget)])
    most, mine = max(map(len, cut)), cut[parallel.rank()]
    company = Piece(torch.tensor([min(range(len(costs)), key=costs.__getitem__)]), 0)
    return [Piece(rows, 1) for rows in mine] + [company] * (most - len(mine))


def shares(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Places for each rank, at about the same cost: the largest first, to whom has least."""
    out: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cost, rank = heapq.heappop(load)
        out[rank].append(i)
        heapq.heappush(load, (cost + costs[i], rank))
    return out


def forward_all(
    module: Callable[[Sequences], tuple[Tensor, ...]],
    sequences: Sequences,
    budget: int,
    by_token: Sequence[bool],
) -> tuple[Tensor, ...]:
    """module(sequences) without gradients, in micro-batches over all ranks, put together again.

    `by_token` says of each output whether it is flat over answer tokens, (n), or has a row for each
    sequence, (s, ...).
    """
    with torch.no_grad():
        parts = [(piece, module(sequences.rows(piece.rows))) for piece in sequences.pieces(budget)]
        return tuple(
            gathered(sequences, [(piece, outputs[i]) for piece, outputs in parts], flat)
            for i, flat in enumerate(by_token)
        )


def gathered(sequences: Sequences, parts: list[tuple[Piece, Tensor]], by_token: bool) -> Tensor:
    """One output of all micro-batches and ranks, in the sequences' order."""
    first = parts[0][1]
    shape = (sequences.count,) if by_token else (len(sequences), *first.shape[1:])
    out = first.new_zeros(shape)
    for piece, x in parts:
        if piece.weight:
            out[sequences.flat(piece.rows) if by_token else on_device(piece.rows)] = x
    return parallel.all_sum(out)
