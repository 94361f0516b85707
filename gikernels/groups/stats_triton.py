"""The Triton half of stats.py: count, mean and M2 of groups.

Imported when the first kernel is launched. Few groups are one launch: a program takes a slice of
the values and a handful of groups, and the last of the programs that share groups merges their
parts. There each value is read once for every eight groups, so many groups are sorted first, and a
program takes a piece of the values of one group.
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
def _merge_all(count, mean, m2):
    """Of (parts, groups) the statistics of each group: three sums, which are trees."""
    total = tl.sum(count, 0)
    whole_mean = tl.sum(count * mean, 0) / tl.where(total > 0, total, 1.0)
    delta = mean - whole_mean[None, :]
    return total, whole_mean, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def _moments(weight, x, member):
    """The statistics of each column of (values, groups), where `member` says who belongs."""
    count = tl.sum(weight, 0)
    mean = tl.sum(tl.where(member, weight * x, 0.0), 0) / tl.where(count > 0, count, 1.0)
    deviation = tl.where(member, x - mean[None, :], 0.0)
    return count, mean, tl.sum(weight * deviation * deviation, 0)


# --- few groups ---------------------------------------------------------------------------------


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
        block_count, block_mean, block_m2 = _moments(weight, x, member)
        count, mean, m2 = _merge(count, mean, m2, block_count, block_mean, block_m2)

    if PARTS > 1:
        mine = partials + part * 3 * G + group
        tl.store(mine, count, mask=real)
        tl.store(mine + G, mean, mask=real)
        tl.store(mine + 2 * G, m2, mask=real)
        _, last = grid.arrive(counters + tile, part, tl.num_programs(1))
        real = real & last
        part_of = partials + tl.arange(0, PARTS)[:, None] * 3 * G + group[None, :]
        theirs = real[None, :]
        count, mean, m2 = _merge_all(
            tl.load(part_of, mask=theirs, other=0),
            tl.load(part_of + G, mask=theirs, other=0),
            tl.load(part_of + 2 * G, mask=theirs, other=0),
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


def _few(values: Tensor, group_ids: Tensor, weights: Tensor | None, out: GroupStats) -> None:
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
            STAT=_stat(out),
            **cut,
        )


# --- many groups --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["G", "P"])
def _pieces_kernel(
    values,  # (n)
    values_t,
    weights,  # (n), or unused
    weights_t,
    order,  # (n) places of the values, group after group
    starts,  # (G + 1) where groups start in `order`
    first_piece,  # (G + 1) where groups start among pieces
    group_of,  # (P) of each piece; G, or more, of those that nobody needs
    partials,  # (3, P) float64, out
    G,
    P,
    HAS_WEIGHTS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    group = tl.load(group_of + piece)
    if group < G:
        first = tl.load(starts + group) + (piece - tl.load(first_piece + group)) * PIECE
        end = tl.minimum(first + PIECE, tl.load(starts + group + 1))
        count = tl.zeros((1,), tl.float64)
        mean = tl.zeros((1,), tl.float64)
        m2 = tl.zeros((1,), tl.float64)
        for start in range(first, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < end
            at = tl.load(order + i, mask=inside, other=0)
            x = tl.load(values + at * values_t, mask=inside, other=0).to(tl.float64)
            weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
            if HAS_WEIGHTS:
                weight = tl.load(weights + at * weights_t, mask=inside, other=0).to(tl.float64)
            block_count, block_mean, block_m2 = _moments(
                weight[:, None], x[:, None], inside[:, None]
            )
            count, mean, m2 = _merge(count, mean, m2, block_count, block_mean, block_m2)
        to = partials + piece + tl.arange(0, 1)
        tl.store(to, count)
        tl.store(to + P, mean)
        tl.store(to + 2 * tl.cast(P, tl.int64), m2)


@triton.jit(do_not_specialize=["G", "P"])
def _join_kernel(
    partials,  # (3, P) float64
    first_piece,  # (G + 1)
    count_out,  # (G) out
    mean_out,  # (G) out
    m2_out,  # (G) out
    G,
    P,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    STAT: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    real = group < G
    first = tl.load(first_piece + group, mask=real, other=0)
    parts = tl.load(first_piece + group + 1, mask=real, other=0) - first
    plane = tl.cast(P, tl.int64)
    count = tl.zeros((GROUPS,), tl.float64)
    mean = tl.zeros((GROUPS,), tl.float64)
    m2 = tl.zeros((GROUPS,), tl.float64)
    for start in range(0, tl.max(parts, 0), PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        theirs = part < parts[None, :]
        at = partials + first[None, :] + part
        some_count, some_mean, some_m2 = _merge_all(
            tl.load(at, mask=theirs, other=0),
            tl.load(at + plane, mask=theirs, other=0),
            tl.load(at + 2 * plane, mask=theirs, other=0),
        )
        count, mean, m2 = _merge(count, mean, m2, some_count, some_mean, some_m2)
    tl.store(count_out + group, count.to(STAT), mask=real)
    tl.store(mean_out + group, mean.to(STAT), mask=real)
    tl.store(m2_out + group, m2.to(STAT), mask=real)


FEW = 64  # groups, for which reading all values once for every eight of them is bearable
SHORT = 4096  # values, for which it always is, being one launch
JOINED = {"GROUPS": 8, "PARTS": 16}


def _pieces(n: int, num_groups: int) -> dict[str, int]:
    """Values of one program, a few blocks of them, in two variants for small and large groups."""
    block = 1024 if n > 256 * num_groups else 128
    return {"PIECE": 4 * block, "BLOCK": block}


def _many(values: Tensor, group_ids: Tensor, weights: Tensor | None, out: GroupStats) -> None:
    """Nobody waits for a count: what depends on the sizes of groups stays on the device, and P is
    the number of pieces where every group has one that is not full. An id out of range lies before
    the first start or after the last."""
    n, num_groups, device = len(values), len(out.count), values.device
    cut = _pieces(n, num_groups)
    # A radix sort passes over the keys once for each of their bytes.
    narrow = torch.int16 if num_groups < 1 << 15 else torch.int32
    ids, order = torch.sort(group_ids.clamp(-1, num_groups).to(narrow), stable=True)
    bounds = torch.arange(num_groups + 1, device=device)
    starts = torch.searchsorted(ids, bounds.to(narrow))
    first_piece = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + cut["PIECE"] - 1) // cut["PIECE"], 0, out=first_piece[1:])
    most = n // cut["PIECE"] + num_groups
    pieces = torch.arange(most, device=device)
    group_of = torch.searchsorted(first_piece[1:], pieces, right=True)
    partials = values.new_empty(3, most, dtype=torch.float64)
    with grid.on(device):
        _pieces_kernel[(most,)](
            values,
            values.stride(0),
            values if weights is None else weights,
            0 if weights is None else weights.stride(0),
            order,
            starts,
            first_piece,
            group_of,
            partials,
            num_groups,
            most,
            HAS_WEIGHTS=weights is not None,
            **cut,
        )
        _join_kernel[(triton.cdiv(num_groups, JOINED["GROUPS"]),)](
            partials,
            first_piece,
            *out,
            num_groups,
            most,
            STAT=_stat(out),
            **JOINED,
        )


def _stat(out: GroupStats) -> Any:
    return tl.float64 if out.mean.dtype == torch.float64 else tl.float32


def group_stats(values: Tensor, group_ids: Tensor, weights: Tensor | None, out: GroupStats) -> None:
    many = len(out.count) > FEW and len(values) > SHORT
    (_many if many else _few)(values, group_ids, weights, out)


# --- ahead-of-time compilation ------------------------------------------------------------------


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
    for name, n, num_groups, weighted in (
        ("large", 1 << 24, 4096, True),
        ("small", 1 << 20, 1 << 16, False),
    ):
        ids = ("order", "starts", "first_piece", "group_of")
        types = {"partials": "*fp64", "P": "i32"} | dict.fromkeys(ids, "*i64")
        yield grid.aot_case(
            _pieces_kernel,
            f"group_stats-pieces-{name}",
            types,
            {
                "values_t": 1,
                "weights_t": int(weighted),
                "HAS_WEIGHTS": weighted,
                **_pieces(n, num_groups),
            },
        )
        if name == "large":
            yield grid.aot_case(
                _join_kernel, "group_stats-join", types, {"STAT": tl.float32, **JOINED}
            )
