"""The C++ half of stats.py, backend "cpp": csrc/stats.cpp through pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.reference import GroupStats, stat_dtype


def group_stats(
    values: Tensor, group_ids: Tensor, num_groups: int, weights: Tensor | None
) -> GroupStats | None:
    """None where an id or a weight is not allowed."""
    from gikernels.backends import build  # here: it needs fcntl, which Windows has not

    dtype = stat_dtype(values, weights)

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype).contiguous()

    inputs = (ready(values), group_ids.long().contiguous(), ready(weights))
    out = GroupStats._make(torch.empty(num_groups, dtype=torch.float64) for _ in range(3))
    suffix = "f64" if dtype == torch.float64 else "f32"
    allowed = getattr(build.library("cpp"), f"gi_group_stats_cpu_{suffix}")(
        *(None if x is None else x.data_ptr() for x in inputs),
        len(values),
        num_groups,
        torch.get_num_threads(),
        *(x.data_ptr() for x in out),
    )
    return GroupStats._make(x.to(dtype) for x in out) if allowed else None
