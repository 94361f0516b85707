"""Rows whose log-sum-exp is all that is kept of them, of one model or of two in front of the same.

A row's sum is kept relative to its largest logit, as everywhere: peak and total, so that
log-sum-exp = peak + log(total).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gikernels.backends.symbols import scalar
from gikernels.vocabulary.head import Head


def tile_total(z: Tensor, spare: Tensor) -> Tensor:
    """(2, n) peak and total of a chunk of logits z (n, c), which stays; overwrites spare."""
    peak = z.amax(1)
    torch.sub(z, peak.masked_fill(peak == -torch.inf, 0).unsqueeze(1), out=spare)
    return torch.stack([peak, spare.exp_().sum(1)])


def merge_totals(a: Tensor, b: Tensor) -> Tensor:
    """Of two sets of columns together, (2, n) each."""
    peak = torch.maximum(a[0], b[0])
    # Where there was nothing yet, -inf - -inf would be NaN; the sums there are 0.
    shift = [torch.where(x[0] == -torch.inf, 0, x[0] - peak).exp() for x in (a, b)]
    return torch.stack([peak, shift[0] * a[1] + shift[1] * b[1]])


def row_temperatures(
    temperature: float, temperatures: Tensor | None, hidden: Tensor, dtype: torch.dtype
) -> Tensor:
    """(N) in the precision of the statistics; a single number takes no memory. A tensor, as
    torch.compile would make a graph for each value of a number."""
    if temperatures is not None:
        return temperatures.to(dtype)
    return scalar(temperature, hidden, dtype).expand(hidden.shape[0])


class Pair(NamedTuple):
    """Both models in front of the same rows."""

    x: Tensor  # (n, D)
    head: Head
    ref_x: Tensor  # (n, D')
    ref_head: Head
    temperature: Tensor  # (n)
    factor: Tensor  # (n) what a row's gradient is multiplied by

    def rows(self, rows: slice) -> Pair:
        return self._replace(
            x=self.x[rows],
            ref_x=self.ref_x[rows],
            temperature=self.temperature[rows],
            factor=self.factor[rows],
        )
