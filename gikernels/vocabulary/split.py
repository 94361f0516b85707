"""A head whose vocabulary is split over the ranks of a group: who has what, and how it is merged.

Each rank has some rows of weight and bias, in rank order, and every rank all hidden states. A row's
statistics (head.RowStats) are formed of each part alone, gathered, and merged as those of two tiles
are. The gradient of a part's logits needs the merged statistics and nothing else, so dW and db are
local, and dX is the sum of what the parts give. Nobody communicates without a group.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gikernels.backends import checks
from gikernels.vocabulary.head import RowStats, merge

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# --- arguments ----------------------------------------------------------------------------------


class LocalHead(NamedTuple):
    """The tensors of this rank, and the name of the group that they are split over, or ""."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref: tuple[Tensor, Tensor] | None
    group: str


def local_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor, Tensor] | None,
    vocab_group: dist.ProcessGroup | None,
) -> LocalHead:
    """A DTensor is taken as the part that lies here: Shard(0) over one dimension of ranks makes
    those the group, Replicate() is a plain tensor."""
    if vocab_group is not None and not isinstance(vocab_group, dist.ProcessGroup):
        raise checks.wrong("vocab_group", vocab_group, "a torch.distributed group or None")
    group = "" if vocab_group is None else vocab_group.group_name
    if not checks.is_dtensor(weight):
        if bias is not None:
            checks.not_sharded("bias", bias)
        if isinstance(ref, (tuple, list)) and len(ref) == 2:
            checks.not_sharded("ref[1]", ref[1])
    else:
        over = _split_over("weight", weight)
        if over and group not in ("", over):
            raise ValueError(
                f"vocab_group: got the group {group!r}, want {over!r}, over which weight is "
                "sharded, or None"
            )
        group = group or over
        bias = None if bias is None else _part("bias", bias, over)
        if isinstance(ref, (tuple, list)) and len(ref) == 2:
            ref = (_replicated("ref[0]", ref[0]), _part("ref[1]", ref[1], over))
        weight = weight.to_local()
    return LocalHead(_replicated("hidden", hidden), weight, bias, ref, group)


def _split_over(name: str, x: DTensor) -> str:
    """The group over whose ranks a DTensor's rows are split, "" where each has all of them."""
    from torch.distributed.tensor import Replicate, Shard

    if all(p == Replicate() for p in x.placements):
        return ""
    if tuple(x.placements) == (Shard(0),):
        return x.device_mesh.get_group().group_name
    raise ValueError(
        f"{name}: got a DTensor placed {tuple(x.placements)} on {x.device_mesh}, want Shard(0) on "
        "a mesh of one dimension, or Replicate(); inside the head module's forward() FSDP has "
        "gathered its shards"
    )


def _part(name: str, x: Tensor, over: str) -> Tensor:
    """The part of bias or reference that lies here; a plain tensor is that part already."""
    if not checks.is_dtensor(x):
        return x
    if _split_over(name, x) != over:
        raise ValueError(
            f"{name}: got a DTensor placed {tuple(x.placements)} on {x.device_mesh}, want the "
            "placement and the mesh of weight"
        )
    return x.to_local()


def _replicated(name: str, x: Tensor) -> Tensor:
    if not checks.is_dtensor(x):
        return x
    if _split_over(name, x):
        raise ValueError(
            f"{name}: got a DTensor placed {tuple(x.placements)}, want the same rows on every "
            f"rank: {name}.redistribute(placements=[Replicate()])"
        )
    return x.to_local()


# --- communication ------------------------------------------------------------------------------


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _gathered(x: Tensor, group: str) -> list[Tensor]:
    """Of each rank, in rank order."""
    out = [torch.empty_like(x) for _ in range(_group(group).size())]
    dist.all_gather(out, x, group=_group(group))
    return out


def place(size: int, targets: Tensor, group: str) -> tuple[int, int]:
    """Where this rank's part of the vocabulary starts, and the size of the whole.

    Raises where ranks have different rows, which would give wrong numbers: a weight that FSDP has
    sharded looks like a split vocabulary.
    """
    if not group:
        return 0, size
    order = torch.arange(1, len(targets) + 1, device=targets.device)
    own = torch.stack([order.new_tensor(size), order.new_tensor(len(order)), targets @ order])
    sizes, *rows = torch.stack(_gathered(own, group), 1).tolist()
    if any(len(set(x)) > 1 for x in rows):
        raise ValueError(
            f"vocab_group: got targets that differ between its ranks ({rows[0]} rows), want the "
            "same rows on every rank. A weight that FSDP has sharded is a plain tensor inside the "
            "head module's forward()"
        )
    return sum(sizes[: _group(group).rank()]), sum(sizes)


def merged(stats: Tensor, target_u: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Of all parts: statistics (3 or 6, N), and the target's logit minus the peak (N)."""
    mine = torch.cat([stats, target_u.unsqueeze(0)])
    parts = _gathered(mine, group)
    none = stats.new_empty(0)
    rows = [RowStats._make([*part[:-1], none, none, none][:6]) for part in parts]
    whole = functools.reduce(merge, rows)
    # Where it is not, it is -inf.
    found = torch.stack([p[-1] + (row.peak - whole.peak) for p, row in zip(parts, rows)])
    return torch.stack([x for x in whole if len(x)]), found.amax(0)


def summed_(x: Tensor, group: str) -> Tensor:
    if group:
        dist.all_reduce(x, group=_group(group))
    return x
