"""Triton device functions of the kernels over sequences: scans, moments, tiles of tokens.

docs/math.md derives the scan and the merging of moments. Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- scans --------------------------------------------------------------------------------------


@triton.jit
def affine(later_a, later_b, here_a, here_b):
    """x -> a x + b, the later segment first: the scan runs from the right."""
    return later_a * here_a, here_b + here_a * later_b


@triton.jit
def gae_tile(
    rewards,  # (ROWS, BT), zero where masked
    values,  # (ROWS, BT), zero where masked
    keep,  # (ROWS, BT)
    ends,  # (ROWS, BT), the last unmasked step of a sequence, where it lies in this tile
    beyond,  # (ROWS), the value after the end; None for 0
    centre,  # (ROWS), near which values lie; found where a sequence ends
    passed,  # (ROWS), what the next step passes on to the one before it
    gamma,
    lam,
    scratch,  # (ROWS, BT) pointers, for DIVIDE False
    inside,  # (ROWS, BT), whether they may be used
    DIVIDE: tl.constexpr,  # gamma * lam is not small
):
    """(advantages, centre, passed on by the tile's first step).

    A step passes on  p = gamma (1 - lam) V + gamma lam R  of its lambda-return R = r + p_next, so
    p is one affine scan, and as R = A + V,  A = (p - gamma V) / (gamma lam).  Where that is small
    the division would magnify rounding, and p_next is read from a neighbour instead. Values are
    taken relative to their sequence's last, so that an offset of 1e6 costs no digits.
    """
    ended = tl.max(ends.to(tl.int32), 1) > 0
    centre = tl.where(ended, tl.sum(tl.where(ends, values, 0.0), 1), centre)
    level = tl.where(keep, values - centre[:, None], 0.0)
    reward = rewards - ((1 - gamma) * centre)[:, None]
    # What is passed on to the last step joins its reward at once: an offset of both cancels.
    if beyond is None:
        reward = tl.where(ends, rewards - centre[:, None], reward)
    else:
        reward = tl.where(ends, reward + (gamma * (beyond - centre))[:, None], reward)
    reward = tl.where(keep, reward, 0.0)
    c = gamma * lam
    own = gamma * (1 - lam) * level + c * reward
    decay, pass_on = tl.associative_scan(
        (tl.where(keep, tl.zeros_like(own) + c, 1.0), own), 1, affine, reverse=True
    )
    pass_on += decay * passed[:, None]
    if DIVIDE:
        advantage = (pass_on - gamma * level) * (1 / c)
    else:
        column = tl.arange(0, keep.shape[1])[None, :]
        tl.store(scratch, pass_on, mask=inside)
        tl.debug_barrier()
        # The neighbour's, masked or not: a masked step passes on what was passed to it.
        last = (tl.sum(inside.to(tl.int32), 1) - 1)[:, None]
        following = tl.load(scratch + 1, mask=inside & (column < last), other=0.0)
        following = tl.where(column < last, following, passed[:, None])
        tl.debug_barrier()
        advantage = reward + following - level
    at_start = (tl.arange(0, keep.shape[1]) == 0)[None, :]
    passed = tl.sum(tl.where(at_start, pass_on, 0.0), 1)
    return tl.where(keep, advantage, 0.0), centre, passed


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
