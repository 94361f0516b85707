"""The Triton half of stats.py: count, mean and M2 of groups in one launch.

Imported when the first kernel is launched. A program takes a slice of the values and a handful of
groups; the last of the programs that share groups merges their parts, in the order of slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid
from gikernels.reference import GroupStats


@triton.jit
def _merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan, for weights: counts may be below one."""
    total = count + other_count
    share = other_count / tl.where(total > 0, total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def _group_stats_kernel(
    values,  # (n)
    values_t,
    group_ids,  # (n) contiguous
    weights,  # (n), or unused
    weights_t,
    count_out,  # (G) out
    mean_out,  # (G) out
    m2_out,  # (G) out
    partials,  # (PARTS, 3, G) float64, scratch
    counters,
    n,
    G,
    span,  # values of one program
    HAS_WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAT: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    real = group < G
    count = tl.zeros((GROUPS,), tl.float64)
    mean = tl.zeros((GROUPS,), tl.float64)
    m2 = tl.zeros((GROUPS,), tl.float64)
    first = part.to(tl.int64) * span
    for start in range(0, span, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        inside = (i < n) & (i < first + span)
        x = tl.load(values + i * values_t, mask=inside, other=0).to(tl.float64)[:, None]
        member = tl.load(group_ids + i, mask=inside, other=-1)[:, None] == group[None, :]
        member = member & inside[:, None]
        weight = tl.where(member, 1.0, 0.0).to(tl.float64)
        if HAS_WEIGHTS:
            w = tl.load(weights + i * weights_t, mask=inside, other=0).to(tl.float64)
            weight = tl.where(member, w[:, None], 0.0)
        block_count = tl.sum(weight, 0)
        block_mean = tl.sum(tl.where(member, weight * x, 0.0), 0)
        block_mean = block_mean / tl.where(block_count > 0, block_count, 1.0)
        deviation = tl.where(member, x - block_mean[None, :], 0.0)
        block_m2 = tl.sum(weight * deviation * deviation, 0)
        count, mean, m2 = _merge(count, mean, m2, block_count, block_mean, block_m2)

    if PARTS > 1:
        mine = partials + part * 3 * G + group
        tl.store(mine, count, mask=real)
        tl.store(mine + G, mean, mask=real)
        tl.store(mine + 2 * G, m2, mask=real)
        _, last = grid.arrive(counters + tile, part, tl.num_programs(1))
        real = real & last
        count = tl.zeros((GROUPS,), tl.float64)
        mean = tl.zeros((GROUPS,), tl.float64)
        m2 = tl.zeros((GROUPS,), tl.float64)
        for other in range(PARTS * last.to(tl.int32)):
            part_of = partials + other * 3 * G + group
            count, mean, m2 = _merge(
                count,
                mean,
                m2,
                tl.load(part_of, mask=real, other=0),
                tl.load(part_of + G, mask=real, other=0),
                tl.load(part_of + 2 * G, mask=real, other=0),
            )
    tl.store(count_out + group, count.to(STAT), mask=real)
    tl.store(mean_out + group, mean.to(STAT), mask=real)
    tl.store(m2_out + group, m2.to(STAT), mask=real)


TILE = 1024  # values times groups that a program compares at a time
MOST_PROGRAMS = 256  # enough to fill a GPU; below grid.SLOTS


def _cut(n: int, num_groups: int) -> dict[str, int]:
    """Groups and values of one program. Few groups leave room to cut the values, into parts of at
    least four blocks, and as powers of two so that few variants are compiled."""
    groups = min(8, triton.next_power_of_2(num_groups))
    block = TILE // groups
    room = max(1, MOST_PROGRAMS // triton.cdiv(num_groups, groups))
    wanted = triton.cdiv(n, 4 * block)
    parts = 1 << (max(1, min(room, wanted)).bit_length() - 1)
    return {"GROUPS": groups, "BLOCK": block, "PARTS": parts}


def group_stats(values: Tensor, group_ids: Tensor, weights: Tensor | None, out: GroupStats) -> None:
    n, num_groups = len(values), len(out.count)
    cut = _cut(n, num_groups)
    parts = cut["PARTS"]
    with grid.on(values.device):
        _group_stats_kernel[(triton.cdiv(num_groups, cut["GROUPS"]), parts)](
            values,
            values.stride(0),
            group_ids.contiguous(),
            values if weights is None else weights,
            0 if weights is None else weights.stride(0),
            *out,
            values.new_empty(parts if parts > 1 else 0, 3, num_groups, dtype=torch.float64),
            grid.counters(values.device) if parts > 1 else group_ids,
            n,
            num_groups,
            triton.cdiv(n, parts),
            HAS_WEIGHTS=weights is not None,
            STAT=tl.float64 if out.mean.dtype == torch.float64 else tl.float32,
            **cut,
        )


def aot_cases() -> Iterator[dict[str, Any]]:
    for name, n, num_groups, weighted in (("few", 1 << 20, 2, True), ("many", 4096, 512, False)):
        yield grid.aot_case(
            _group_stats_kernel,
            f"group_stats-{name}",
            {"group_ids": "*i64", "partials": "*fp64", "counters": "*i64", "span": "i32"},
            {
                "values_t": 1,
                "weights_t": int(weighted),
                "HAS_WEIGHTS": weighted,
                "STAT": tl.float32,
                **_cut(n, num_groups),
            },
        )
