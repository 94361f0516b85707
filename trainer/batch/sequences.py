"""Sequences padded on the right, and how a batch is cut into pieces that fit into memory.

With causal attention a pad token on the right is never seen by a real one, so no attention mask is
needed. S sequences, L padded tokens, T padded answer tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import parallel

ENOUGH_FOR_A_CPU = 768
"""Tokens. Measured on the toy model, answers of 1 to 12 tokens, milliseconds a forward / forward
and backward of 128 sequences: 52 / 147 in one batch, 38 / 117 like this, 40 / 113 at 256."""


@dataclass(frozen=True)
class Sequences:
    """Prompts followed by their answers."""

    tokens: Tensor  # (S, L) int64, padded on the right
    prompt_lengths: Tensor  # (S)
    lengths: Tensor  # (S) of prompt and answer together
    shared: bool = False  # several answers to a prompt: models compute a shared prompt once

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
        return Sequences(
            self.tokens[index, :width], self.prompt_lengths[index], lengths, self.shared
        )

    def micro_batches(self, budget: int) -> list[Tensor]:
        """Indices in batches of at most `budget` padded tokens; a prompt's answers together."""
        if not self.shared:
            return micro_batches(self.lengths, budget)
        prompts, _ = self.prompts_on_the_right()
        same = torch.unique(prompts, dim=0, return_inverse=True)[1]
        lengths, rows = self.lengths.tolist(), same.argsort(stable=True).tolist()
        batches: list[list[int]] = [[]]
        longest = 0
        for row in rows:
            longest = max(longest, lengths[row])
            if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
                batches.append([])
                longest = lengths[row]
            batches[-1].append(row)
        return [torch.tensor(batch, device=same.device) for batch in batches]

    def pieces(self, budget: int) -> list[Piece]:
        """This rank's micro-batches; see `pieces`."""
        if parallel.world_size() == 1:
            return [Piece(rows, 1) for rows in self.micro_batches(budget)]
        return pieces(self.lengths, budget)

    def prompts_on_the_right(self) -> tuple[Tensor, Tensor]:
        """(S, P) prompts padded on the left with -1, and where the padding is."""
        longest = int(self.prompt_lengths.max())
        places = torch.arange(longest, device=self.tokens.device)
        places = places - (longest - self.prompt_lengths).unsqueeze(1)
        padding = places < 0
        return self.tokens.gather(1, places.clamp(min=0)).masked_fill(padding, -1), padding

    def answers(self) -> list[list[int]]:
        return [
            row[start:end]
            for row, start, end in zip(
                self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist()
            )
        ]

    @staticmethod
    def of(
        prompts: list[list[int]], answers: list[list[int]], pad: int, shared: bool = False
    ) -> Sequences:
        rows = [p + a for p, a in zip(prompts, answers)]
        width = max(map(len, rows))
        return Sequences(
            torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            torch.tensor([len(p) for p in prompts]),
            torch.tensor([len(row) for row in rows]),
            shared,
        ).to(parallel.device())

    def to(self, device: torch.device) -> Sequences:
        return Sequences(
            self.tokens.to(device),
            self.prompt_lengths.to(device),
            self.lengths.to(device),
            self.shared,
        )


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Indices cut into batches of at most `budget` padded tokens, longest sequences first.

    Sorted by length, so that padding is little and a budget that is too large fails at the start.
    A sequence longer than the budget goes alone. A CPU computes small batches as fast as large
    ones, so there a batch of ENOUGH_FOR_A_CPU tokens ends where padding would come to a tenth.
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    enough = ENOUGH_FOR_A_CPU if lengths.device.type == "cpu" else budget
    batches, start = [], 0
    while start < len(sizes):
        longest, end = sizes[start], start + 1
        while end < len(sizes) and (end + 1 - start) * longest <= budget:
            if (end - start) * longest >= enough and sizes[end] < 0.9 * longest:
                break
            end += 1
        batches.append(order[start:end])
        start = end
    return batches


class Piece(NamedTuple):
    rows: Tensor
    weight: int  # 1; or 0 for what only keeps the other ranks company


def pieces(lengths: Tensor, budget: int) -> list[Piece]:
    """This rank's micro-batches. Every rank has equally many, for each forward and backward of a
    sharded model is a collective: a rank that runs out computes on a sequence of another's with
    weight 0."""
    ranks = parallel.world_size()
    if ranks == 1:
        return [Piece(rows, 1) for rows in micro_batches(lengths, budget)]
    cut = []
    for part in shares(lengths.tolist(), ranks):
        rows = torch.tensor(part, dtype=torch.long, device=lengths.device)
        cut.append([rows[some] for some in micro_batches(lengths[rows], budget)])
    most, mine = max(map(len, cut)), cut[parallel.rank()]
    company = Piece(lengths.argmin().view(1), 0)
    return [Piece(rows, 1) for rows in mine] + [company] * (most - len(mine))


def shares(lengths: list[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, with about as many tokens: the longest first, to whom has fewest."""
    out: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = heapq.heappop(load)
        out[rank].append(i)
        heapq.heappush(load, (tokens + lengths[i], rank))
    return out


def forward_all(
    module: Callable[[Sequences], tuple[Tensor, ...]], sequences: Sequences, budget: int
) -> tuple[Tensor, ...]:
    """module(sequences) without gradients, in micro-batches over all ranks, put together again.

    The module returns tensors (s, T) over answer tokens, or (s) or (s, M); T may be shorter for
    some micro-batches, and what they leave out is padding.
    """
    with torch.no_grad():
        parts = [(piece, module(sequences.rows(piece.rows))) for piece in sequences.pieces(budget)]
        columns = list(zip(*(outputs for _, outputs in parts)))
        widths = [max(x.shape[1] if x.dim() > 1 else 0 for x in column) for column in columns]
        outputs = []
        for column, width in zip(columns, parallel.all_max(widths)):
            shape = (len(sequences), width) if column[0].dim() > 1 else (len(sequences),)
            out = column[0].new_zeros(shape)
            for (piece, _), x in zip(parts, column):
                if piece.weight and x.dim() > 1:
                    out[piece.rows, : x.shape[1]] = x
                elif piece.weight:
                    out[piece.rows] = x
            outputs.append(parallel.all_sum(out))
    return tuple(outputs)
