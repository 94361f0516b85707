"""The tokens that each answer token could be sampled from, where that was not the whole vocabulary.

Top-p and top-k sample from a truncated distribution, and ratios of probabilities are those of what
was sampled only if the trainer truncates alike. Truncating again would not do: a token at the edge
falls on this side or on that by rounding. So the engine's kept ids travel with the answers.
n answer tokens, flat; on the CPU, as everything that is an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gikernels import Support
from trainer import parallel
from trainer.batch.sequences import Sequences, on_device, ranges


def gathered(keys: Tensor, ids: Tensor) -> Support:
    """Of every rank's kept ids, (m), with keys that rise from answer token to answer token."""
    parts = parallel.gather_objects((keys, ids))
    keys, ids = (torch.cat(part) for part in zip(*parts))
    keys, order = keys.sort(stable=True)
    _, counts = keys.unique_consecutive(return_counts=True)
    return Support(F.pad(counts.cumsum(0), (1, 0)), ids[order])


def of_rows(support: Support | None, sequences: Sequences, rows: Tensor) -> Support | None:
    """Of some answers' tokens, in their order; on the CPU."""
    if support is None:
        return None
    places = sequences.places(rows)
    lengths = support.offsets.diff()[places]
    kept = ranges(support.offsets[places], lengths)
    return Support(F.pad(lengths.cumsum(0), (1, 0)), support.ids[kept])


def joined(parts: Sequence[Support | None]) -> Support | None:
    """Of rollouts one after the other, which one engine has sampled: all have one, or none has."""
    some = [part for part in parts if part is not None]
    if not some:
        return None
    counts = torch.cat([part.offsets.diff() for part in some])
    return Support(F.pad(counts.cumsum(0), (1, 0)), torch.cat([part.ids for part in some]))


def here(support: Support | None) -> Support | None:
    """For an operation: on the device."""
    return None if support is None else Support(*map(on_device, support))
