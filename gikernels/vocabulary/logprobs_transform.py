"""What both halves of `logprobs` know: where rows of logits lie, and how they become final ones."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """From the given logits to the final ones: scale, softcap, temperature, in this order."""

    temperature: float | Tensor  # a number, or (N)
    softcap: float | None
    logit_scale: float


def row_view(logits: Tensor) -> Tensor:
    """(..., V) as (A, B, V), a view unless three strides lead: `logits[:, :-1]` is not copied."""
    *lead, vocab = logits.shape
    for k in range(len(lead) + 1):
        try:
            return logits.view(math.prod(lead[:k]), math.prod(lead[k:]), vocab)
        except RuntimeError:
            continue
    return logits.reshape(1, -1, vocab)
