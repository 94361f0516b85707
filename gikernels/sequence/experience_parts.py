"""Triton device functions of the kernels over sequences: scans, moments, tiles of tokens.

docs/math.md derives the scan and the merging of moments. Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- scans --------------------------------------------------------------------------------------
# Scans run from the right: the first argument of a combine is the later segment.


@triton.jit
def nearest_two(later, later_1, later_2, here, here_1, here_2):
    """How many unmasked steps a segment has (two is many), and the values of its first two."""
    second = tl.where(here > 1, here_2, later_1)
    return (
        tl.minimum(later + here, 2),
        tl.where(here > 0, here_1, later_1),
        tl.where(here > 0, second, later_2),
    )


@triton.jit
def affine(later_a, later_b, here_a, here_b):
    """x -> a x + b, the later segment first."""
    return later_a * here_a, here_b + here_a * later_b


@triton.jit
def gae_tile(
    rewards,  # (ROWS, BT), zero where masked
    values,  # (ROWS, BT), zero where masked
    keep,  # (ROWS, BT)
    next_advantage,  # (ROWS), of the nearest unmasked step right of the tile
    next_value,  # (ROWS)
    gamma,
    lam,
):
    zero = tl.zeros_like(values)
    count, first, second = tl.associative_scan(
        (keep.to(tl.int32), values, zero), 1, nearest_two, reverse=True
    )
    following = tl.where(count > 1, second, next_value[:, None])
    # The two values first: they are close to each other, and an offset of both cancels.
    delta = tl.where(keep, rewards + (gamma * following - values), 0.0)
    decay, advantage = tl.associative_scan(
        (tl.where(keep, zero + gamma * lam, 1.0), delta), 1, affine, reverse=True
    )
    advantage = advantage + decay * next_advantage[:, None]
    at_start = (tl.arange(0, keep.shape[1]) == 0)[None, :]
    next_advantage = tl.sum(tl.where(at_start, advantage, 0.0), 1)
    first_value = tl.sum(tl.where(at_start, first, 0.0), 1)
    next_value = tl.where(tl.max(count, 1) > 0, first_value, next_value)
    return tl.where(keep, advantage, 0.0), next_advantage, next_value


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = d * d * 0.5
    else:
        # exp(-d) - 1 + d has no correct digit left at d = 1e-4. Below 1/2 it is the series
        # d^2 / 2 (1 - d/3 (1 - d/4 (1 - ...))), whose first term left out is 2 d^15 / 17!.
        nested = tl.zeros_like(d) + 1.0
        for k in tl.static_range(16, 2, -1):
            nested = 1.0 - d * (1.0 / k) * nested
        kl = tl.where(tl.abs(d) < 0.5, d * d * 0.5 * nested, tl.exp(-d) - 1.0 + d)
    return kl


# --- moments ------------------------------------------------------------------------------------
# float64: they are a handful of numbers a sequence, and an offset of 1e6 is harmless.


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan: the moments of two halves together."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def merge_all(count, mean, m2):
    """Chan for many parts at once, along the first axis."""
    total = tl.sum(count, 0)
    merged = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    delta = mean - merged
    return total, merged, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def tile_moments(x, keep):
    """Moments of each row of a tile, x zero where masked."""
    count = tl.sum(keep.to(x.dtype), 1)
    n = tl.maximum(count, 1.0)
    centre = tl.sum(x, 1) / n
    # `centre` is rounded; the sum of deviations from it says by how much.
    deviation = tl.where(keep, x - centre[:, None], 0.0)
    rest = tl.sum(deviation, 1).to(tl.float64)
    squares = tl.sum(deviation * deviation, 1).to(tl.float64)
    count, n = count.to(tl.float64), n.to(tl.float64)
    return count, centre.to(tl.float64) + rest / n, squares - rest * rest / n


@triton.jit
def merge_group(
    partials,  # (3, rows) float64: count, mean, M2
    rows,
    group_ids,  # (rows)
    group,
    BY_ID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In the order of rows, so that two runs agree in every bit."""
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        member = i < rows
        if BY_ID:
            member = member & (tl.load(group_ids + i, mask=member, other=-1) == group)
        part = partials + i
        part_count, part_mean, part_m2 = merge_all(
            tl.load(part, mask=member, other=0.0),
            tl.load(part + rows, mask=member, other=0.0),
            tl.load(part + 2 * rows, mask=member, other=0.0),
        )
        count, mean, m2 = merge(count, mean, m2, part_count, part_mean, part_m2)
    return count, mean, m2


# --- tiles of tokens ----------------------------------------------------------------------------


@triton.jit
def extent(seq, S, T, N, cu_seqlens, FLAT: tl.constexpr):
    """Where each sequence starts in a contiguous token tensor, and how many steps it has."""
    real = seq < S
    if FLAT:  # clamped, so that a wrong cu_seqlens never leads out of the tensors
        start = tl.load(cu_seqlens + seq, mask=real, other=0).to(tl.int64)
        stop = tl.load(cu_seqlens + seq + 1, mask=real, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), N)
        length = (tl.minimum(stop, N) - start).to(tl.int32)
    else:
        start = seq.to(tl.int64) * T
        length = tl.where(real, T, 0)
    return start, length


@triton.jit
def load(tensor, stride_s, stride_t, seq, start, t, inside, FLAT: tl.constexpr):
    """A (ROWS, BT) tile at steps t: row seq of (S, T), or rows start + t of (N)."""
    if FLAT:
        base = start * stride_t
    else:
        base = seq.to(tl.int64) * stride_s
    return tl.load(
        tensor + base[:, None] + t.to(tl.int64)[None, :] * stride_t, mask=inside, other=0
    )


@triton.jit
def kept(kept, inside, ignore_index, KEPT_IS_TARGET: tl.constexpr):
    """`kept` holds the mask, or targets of which `ignore_index` means masked."""
    if KEPT_IS_TARGET:
        keep = kept != ignore_index
    else:
        keep = kept != 0
    return keep & inside
