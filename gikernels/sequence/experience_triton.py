"""The Triton half of experience.py: kernels, their launchers, cases for ahead-of-time compilation.

Imported when the first kernel is launched. docs/math.md derives the scan and the merging of
moments.

`experience` is one launch. A program walks whole sequences from their last block to their first
and carries what the next block needs: advantage and value of the nearest unmasked step. A masked
step is the identity of both scans, so holes and ragged ends need no compaction. The moments of the
advantages meet in the same launch (`grid.arrive`), and it normalises before it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid
from gikernels.reference import Experience, Gae

# --- kernels: scans -----------------------------------------------------------------------------
# Scans run from the right: the first argument of a combine is the later segment.


@triton.jit
def _nearest_two(later, later_1, later_2, here, here_1, here_2):
    """How many unmasked steps a segment has (two is many), and the values of its first two."""
    second = tl.where(here > 1, here_2, later_1)
    return (
        tl.minimum(later + here, 2),
        tl.where(here > 0, here_1, later_1),
        tl.where(here > 0, second, later_2),
    )


@triton.jit
def _affine(later_a, later_b, here_a, here_b):
    """x -> a x + b, the later segment first."""
    return later_a * here_a, here_b + here_a * later_b


@triton.jit
def _gae_tile(
    rewards,  # (ROWS, BT), zero where masked
    values,  # (ROWS, BT), zero where masked
    keep,  # (ROWS, BT)
    next_advantage,  # (ROWS), of the nearest unmasked step right of the tile
    next_value,  # (ROWS)
    GAMMA: tl.constexpr,
    LAM: tl.constexpr,
):
    zero = tl.zeros_like(values)
    count, first, second = tl.associative_scan(
        (keep.to(tl.int32), values, zero), 1, _nearest_two, reverse=True
    )
    following = tl.where(count > 1, second, next_value[:, None])
    # The two values first: they are close to each other, and an offset of both cancels.
    delta = tl.where(keep, rewards + (GAMMA * following - values), 0.0)
    decay, advantage = tl.associative_scan(
        (tl.where(keep, zero + GAMMA * LAM, 1.0), delta), 1, _affine, reverse=True
    )
    advantage = advantage + decay * next_advantage[:, None]
    at_start = (tl.arange(0, keep.shape[1]) == 0)[None, :]
    next_advantage = tl.sum(tl.where(at_start, advantage, 0.0), 1)
    first_value = tl.sum(tl.where(at_start, first, 0.0), 1)
    next_value = tl.where(tl.max(count, 1) > 0, first_value, next_value)
    return tl.where(keep, advantage, 0.0), next_advantage, next_value


@triton.jit
def _kl_estimate(d, ESTIMATOR: tl.constexpr):
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


# --- kernels: moments ---------------------------------------------------------------------------
# float64: they are a handful of numbers a sequence, and an offset of 1e6 is harmless.


@triton.jit
def _merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan: the moments of two halves together."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def _merge_all(count, mean, m2):
    """Chan for many parts at once, along the first axis."""
    total = tl.sum(count, 0)
    merged = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    delta = mean - merged
    return total, merged, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def _tile_moments(x, keep):
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
def _merge_group(
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
        part_count, part_mean, part_m2 = _merge_all(
            tl.load(part, mask=member, other=0.0),
            tl.load(part + rows, mask=member, other=0.0),
            tl.load(part + 2 * rows, mask=member, other=0.0),
        )
        count, mean, m2 = _merge(count, mean, m2, part_count, part_mean, part_m2)
    return count, mean, m2


# --- kernels: the entries -----------------------------------------------------------------------


@triton.jit
def _extent(seq, S, T, N, cu_seqlens, FLAT: tl.constexpr):
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
def _load(tensor, stride_s, stride_t, seq, start, t, inside, FLAT: tl.constexpr):
    """A (ROWS, BT) tile at steps t: row seq of (S, T), or rows start + t of (N)."""
    if FLAT:
        base = start * stride_t
    else:
        base = seq.to(tl.int64) * stride_s
    return tl.load(
        tensor + base[:, None] + t.to(tl.int64)[None, :] * stride_t, mask=inside, other=0
    )


@triton.jit
def _kept(kept, inside, ignore_index, KEPT_IS_TARGET: tl.constexpr):
    """`kept` holds the mask, or targets of which `ignore_index` means masked."""
    if KEPT_IS_TARGET:
        keep = kept != ignore_index
    else:
        keep = kept != 0
    return keep & inside


@triton.jit
def _gae_kernel(
    rewards,  # (S, T)
    rewards_s,
    rewards_t,
    values,  # (S, T)
    values_s,
    values_t,
    mask,  # (S, T)
    mask_s,
    mask_t,
    last_values,  # (S)
    advantages,  # (S, T) out, contiguous
    returns,  # (S, T) out, contiguous
    S,
    T,
    GAMMA: tl.constexpr,
    LAM: tl.constexpr,
    HAS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    STAT: tl.constexpr,
):
    seq = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, length = _extent(seq, S, T, 0, seq, False)
    next_advantage = tl.zeros((ROWS,), STAT)
    next_value = tl.zeros((ROWS,), STAT)
    if HAS_LAST:
        next_value = tl.load(last_values + seq, mask=seq < S, other=0).to(STAT)
    blocks = tl.cdiv(T, BT)
    for back in range(blocks):
        t = (blocks - 1 - back) * BT + tl.arange(0, BT)
        inside = t[None, :] < length[:, None]
        keep = _load(mask, mask_s, mask_t, seq, start, t, inside, False)
        keep = _kept(keep, inside, 0, False)
        reward = _load(rewards, rewards_s, rewards_t, seq, start, t, inside, False).to(STAT)
        value = _load(values, values_s, values_t, seq, start, t, inside, False).to(STAT)
        value = tl.where(keep, value, 0.0)
        advantage, next_advantage, next_value = _gae_tile(
            tl.where(keep, reward, 0.0), value, keep, next_advantage, next_value, GAMMA, LAM
        )
        out = start[:, None] + t[None, :]
        tl.store(advantages + out, advantage, mask=inside)
        tl.store(returns + out, advantage + value, mask=inside)


@triton.jit
def _experience_kernel(
    logprobs,  # (S, T) or (N); or the exact KL
    logprobs_s,
    logprobs_t,
    ref_logprobs,  # (S, T) or (N)
    ref_s,
    ref_t,
    values,  # (S, T) or (N)
    values_s,
    values_t,
    kept,  # (S, T) or (N), see _kept
    kept_s,
    kept_t,
    scores,  # (S)
    kl_coefs,  # (S), or unused where kl_coef is one number
    kl_coef,
    cu_seqlens,  # (S + 1)
    group_ids,  # (S)
    rewards,  # (S, T) or (N), out, contiguous, as the next three
    kl,
    advantages,
    returns,
    seq_kl,  # (S) out
    moments,  # (G, 3) out
    partials,  # (3, S) for groups, (3, programs) for the batch; float64, scratch
    merged,  # (3, G) float64, scratch
    counter,
    S,
    T,
    N,
    G,
    ignore_index,
    GAMMA: tl.constexpr,
    LAM: tl.constexpr,
    EPS: tl.constexpr,
    ESTIMATOR: tl.constexpr,  # k1, k2, k3 or exact
    NORM: tl.constexpr,  # none, batch, group
    APPLY: tl.constexpr,  # normalise here, or leave it to normalize_advantages
    HAS_VALUES: tl.constexpr,
    FLAT: tl.constexpr,
    KEPT_IS_TARGET: tl.constexpr,
    COEF_PER_SEQUENCE: tl.constexpr,
    RESIDENT: tl.constexpr,  # all programs run at once and can wait for each other
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    STAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(S, ROWS)
    batch_count = tl.zeros((ROWS,), tl.float64)
    batch_mean = tl.zeros((ROWS,), tl.float64)
    batch_m2 = tl.zeros((ROWS,), tl.float64)

    for tile in range(program, tiles, programs):
        seq = tile * ROWS + tl.arange(0, ROWS)
        real = seq < S
        start, length = _extent(seq, S, T, N, cu_seqlens, FLAT)
        score = tl.load(scores + seq, mask=real, other=0).to(STAT)
        coef = tl.zeros((ROWS,), STAT) + kl_coef
        if COEF_PER_SEQUENCE:
            coef = tl.load(kl_coefs + seq, mask=real, other=0).to(STAT)
        next_advantage = tl.zeros((ROWS,), STAT)
        next_value = tl.zeros((ROWS,), STAT)
        sum_kl = tl.zeros((ROWS,), STAT)
        total = tl.zeros((ROWS,), STAT)
        scored = tl.zeros((ROWS,), tl.int32)
        count = tl.zeros((ROWS,), tl.float64)
        mean = tl.zeros((ROWS,), tl.float64)
        m2 = tl.zeros((ROWS,), tl.float64)

        blocks = tl.cdiv(tl.max(length, 0), BT)
        for back in range(blocks):
            t = (blocks - 1 - back) * BT + tl.arange(0, BT)
            inside = t[None, :] < length[:, None]
            # All loads first: nothing of what follows can hide their latency.
            keep = _load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
            estimate = _load(logprobs, logprobs_s, logprobs_t, seq, start, t, inside, FLAT).to(STAT)
            if ESTIMATOR != "exact":
                ref = _load(ref_logprobs, ref_s, ref_t, seq, start, t, inside, FLAT).to(STAT)
            if HAS_VALUES:
                value = _load(values, values_s, values_t, seq, start, t, inside, FLAT).to(STAT)
            keep = _kept(keep, inside, ignore_index, KEPT_IS_TARGET)
            if ESTIMATOR != "exact":
                estimate = _kl_estimate(tl.where(keep, estimate - ref, 0.0), ESTIMATOR)
            estimate = tl.where(keep, estimate, 0.0)
            last = tl.max(tl.where(keep, t[None, :], -1), 1)
            pays = (t[None, :] == last[:, None]) & keep & (scored == 0)[:, None]
            scored = tl.where(last >= 0, 1, scored)
            reward = tl.where(pays, score[:, None], 0.0) - coef[:, None] * estimate
            # What a NaN coefficient makes of a masked zero stays out as well.
            reward = tl.where(keep, reward, 0.0)
            sum_kl += tl.sum(estimate, 1)
            out = start[:, None] + t[None, :]
            tl.store(kl + out, estimate, mask=inside)
            tl.store(rewards + out, reward, mask=inside)
            if HAS_VALUES:
                value = tl.where(keep, value, 0.0)
                advantage, next_advantage, next_value = _gae_tile(
                    reward, value, keep, next_advantage, next_value, GAMMA, LAM
                )
                tl.store(advantages + out, advantage, mask=inside)
                tl.store(returns + out, advantage + value, mask=inside)
                if NORM != "none":
                    tile_count, tile_mean, tile_m2 = _tile_moments(advantage, keep)
                    count, mean, m2 = _merge(count, mean, m2, tile_count, tile_mean, tile_m2)
            else:
                total += tl.sum(reward, 1)
                count += tl.sum(keep.to(tl.int32), 1).to(tl.float64)
        tl.store(seq_kl + seq, sum_kl, mask=real)

        if not HAS_VALUES:  # every token's advantage is the sum, known only now
            mean = tl.where(count > 0, total.to(tl.float64), 0.0)
            for block in range(blocks):
                t = block * BT + tl.arange(0, BT)
                inside = t[None, :] < length[:, None]
                keep = _load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
                keep = _kept(keep, inside, ignore_index, KEPT_IS_TARGET)
                spread = tl.where(keep, total[:, None], 0.0)
                out = start[:, None] + t[None, :]
                tl.store(advantages + out, spread, mask=inside)
                tl.store(returns + out, spread, mask=inside)

        if NORM == "group":
            tl.store(partials + seq, count, mask=real)
            tl.store(partials + S + seq, mean, mask=real)
            tl.store(partials + 2 * S + seq, m2, mask=real)
        elif NORM == "batch":
            batch_count, batch_mean, batch_m2 = _merge(
                batch_count, batch_mean, batch_m2, count, mean, m2
            )

    if NORM == "none":
        if program == 0:
            for column in tl.static_range(3):
                tl.store(moments + column, 0.0)
    else:
        if NORM == "batch":
            own_count, own_mean, own_m2 = _merge_all(batch_count, batch_mean, batch_m2)
            tl.store(partials + program, own_count)
            tl.store(partials + programs + program, own_mean)
            tl.store(partials + 2 * programs + program, own_m2)
        arrived_in, is_last = grid.arrive(counter, program, programs)
        # Who goes on: every program with its share, or the last one with everything.
        if RESIDENT:
            grid.wait(counter, arrived_in)
            first = program
            step = programs
            share = tl.full((), 1, tl.int32)
        else:
            first = program * 0
            step = program * 0 + 1
            share = is_last.to(tl.int32)

        # One group is merged by everybody: cheaper than to wait for it once more.
        for g in range(first if NORM == "group" else 0, G * share, step):
            count, mean, m2 = _merge_group(
                partials,
                S if NORM == "group" else programs,
                group_ids,
                g,
                NORM == "group",
                BLOCK,
            )
            tl.store(merged + g, count)
            tl.store(merged + G + g, mean)
            tl.store(merged + 2 * G + g, m2)
            tl.store(moments + 3 * g, count.to(STAT))
            tl.store(moments + 3 * g + 1, mean.to(STAT))
            tl.store(moments + 3 * g + 2, m2.to(STAT))

        if APPLY:
            if RESIDENT and NORM == "group":
                arrived_in, is_last = grid.arrive(counter, program, programs)
                grid.wait(counter, arrived_in)
            else:
                tl.debug_barrier()  # this program reads what another of its threads has stored
            for turn in range(first, tiles * share, step):
                tile = tiles - 1 - turn  # the latest first: they are still in the L2 cache
                seq = tile * ROWS + tl.arange(0, ROWS)
                real = seq < S
                start, length = _extent(seq, S, T, N, cu_seqlens, FLAT)
                group = seq * 0
                known = real
                if NORM == "group":
                    group = tl.load(group_ids + seq, mask=real, other=0)
                    known = real & (group >= 0) & (group < G)
                unknown = float("nan")  # what a group id out of range makes of its sequence
                count = tl.load(merged + group, mask=known, other=unknown)
                mean = tl.load(merged + G + group, mask=known, other=unknown)
                m2 = tl.load(merged + 2 * G + group, mask=known, other=unknown)
                scale = (1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + EPS)).to(STAT)
                # In two parts: at an offset of 1e6 one float32 would be wrong by 0.03.
                high = mean.to(STAT)
                low = (mean - high.to(tl.float64)).to(STAT)
                for block in range(tl.cdiv(tl.max(length, 0), BT)):
                    t = block * BT + tl.arange(0, BT)
                    inside = t[None, :] < length[:, None]
                    keep = _load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
                    keep = _kept(keep, inside, ignore_index, KEPT_IS_TARGET)
                    out = advantages + start[:, None] + t[None, :]
                    x = tl.load(out, mask=inside, other=0)
                    x = ((x - high[:, None]) - low[:, None]) * scale[:, None]
                    tl.store(out, tl.where(keep, x, 0.0), mask=inside)


@triton.jit
def _normalize_kernel(
    advantages,  # (n) contiguous
    mask,  # (n) contiguous
    moments,  # (G, 3) contiguous
    group_ids,  # (n / T)
    out,  # (n)
    n,
    T,
    G,
    EPS: tl.constexpr,
    BY_ID: tl.constexpr,
    BLOCK: tl.constexpr,
    STAT: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    group = i * 0
    known = inside
    if BY_ID:
        group = tl.load(group_ids + i // T, mask=inside, other=0).to(tl.int64)
        known = inside & (group >= 0) & (group < G)
    unknown = float("nan")
    count = tl.load(moments + 3 * group, mask=known, other=unknown).to(STAT)
    mean = tl.load(moments + 3 * group + 1, mask=known, other=unknown).to(STAT)
    m2 = tl.load(moments + 3 * group + 2, mask=known, other=unknown).to(STAT)
    x = tl.load(advantages + i, mask=inside, other=0).to(STAT)
    x = (x - mean) / tl.sqrt(m2 / tl.maximum(count, 1.0) + EPS)
    keep = tl.load(mask + i, mask=inside, other=0) != 0
    tl.store(out + i, tl.where(keep, x, 0.0), mask=inside)


# --- launchers ----------------------------------------------------------------------------------

TILE = 1024  # elements a program holds: 8 a thread
WARPS = 4
# A cooperative launch wants all its programs resident. 160 registers for each of 128 threads let
# three share the 65536 of a processor, with 40 KB of loads in flight; for four, with 128, some
# variants spill.
MAX_REGISTERS = 160
PROGRAMS_PER_PROCESSOR = 3
BLOCK = 512  # partial moments merged at a time


def _shape_of_tile(steps: int, flat: bool = False) -> dict[str, int]:
    """A tile is one long row, or several short ones. Flat rows are addressed one by one and their
    masks are 64-bit targets: with 8 a thread that took 158 registers."""
    size = TILE // 2 if flat else TILE
    bt = min(size, max(16, triton.next_power_of_2(steps)))
    return {"ROWS": size // bt, "BT": bt}


def _scalar_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _strides(x: Tensor) -> tuple[int, int]:
    return (x.stride(0), x.stride(1)) if x.dim() == 2 else (0, x.stride(0))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
    out: Gae,
) -> None:
    s, t = rewards.shape
    tile = _shape_of_tile(t)
    with grid.on(rewards.device):
        _gae_kernel[(triton.cdiv(s, tile["ROWS"]),)](
            rewards,
            *_strides(rewards),
            values,
            *_strides(values),
            mask,
            *_strides(mask),
            values if last_values is None else last_values.contiguous(),
            *out,
            s,
            t,
            GAMMA=gamma,
            LAM=lam,
            HAS_LAST=last_values is not None,
            STAT=_scalar_type(out.returns.dtype),
            num_warps=WARPS,
            **tile,
        )


def experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    kept: Tensor,
    kl_coefs: Tensor | None,
    kl_coef: float,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    exact_kl: Tensor | None,
    gamma: float,
    lam: float,
    estimator: str,
    norm: str,
    eps: float,
    apply_norm: bool,
    ignore_index: int,
    out: Experience,
    *,
    programs: int | None = None,
    resident: bool | None = None,
) -> None:
    """`programs` and `resident` are for tests, which have no GPU to choose by."""
    device, dtype = out.kl.device, out.kl.dtype
    flat, by_group = cu_seqlens is not None, norm == "group"
    sequences, tokens, num_groups = len(scores), out.kl.numel(), len(out.moments)
    if kl_coefs is None and dtype == torch.float64:  # a number reaches the kernel as float32
        kl_coefs = scores.new_full((sequences,), kl_coef, dtype=dtype)
    steps = tokens // sequences
    tile = _shape_of_tile(steps, flat)
    tiles = triton.cdiv(sequences, tile["ROWS"])
    if resident is None:
        resident = device.type == "cuda" and norm != "none"
    if programs is None:
        programs = tiles
        if resident:
            programs = min(tiles, PROGRAMS_PER_PROCESSOR * grid.processors(device))
    if exact_kl is not None:
        logprobs, estimator = exact_kl, "exact"
    unused = scores
    with grid.on(device):
        _experience_kernel[(programs,)](
            logprobs,
            *_strides(logprobs),
            ref_logprobs,
            *_strides(ref_logprobs),
            logprobs if values is None else values,
            *_strides(logprobs if values is None else values),
            kept,
            *_strides(kept),
            scores.contiguous(),
            unused if kl_coefs is None else kl_coefs.contiguous(),
            kl_coef,
            unused if cu_seqlens is None else cu_seqlens.contiguous(),
            unused if group_ids is None else group_ids.contiguous(),
            *out,
            scores.new_empty(3, sequences if by_group else programs, dtype=torch.float64),
            scores.new_empty(3, num_groups, dtype=torch.float64),
            unused if norm == "none" else grid.counters(device),
            sequences,
            0 if flat else steps,
            tokens,
            num_groups,
            ignore_index,
            GAMMA=gamma,
            LAM=lam,
            EPS=eps,
            ESTIMATOR=estimator,
            NORM=norm,
            APPLY=apply_norm,
            HAS_VALUES=values is not None,
            FLAT=flat,
            KEPT_IS_TARGET=kept.dtype != torch.bool,
            COEF_PER_SEQUENCE=kl_coefs is not None,
            RESIDENT=resident,
            STAT=_scalar_type(dtype),
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
            launch_cooperative_grid=resident,
            **tile,
        )


def normalize(
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor,
    group_ids: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    n = out.numel()
    with grid.on(out.device):
        _normalize_kernel[(triton.cdiv(n, TILE),)](
            advantages.contiguous(),
            mask.contiguous(),
            moments.contiguous(),
            mask if group_ids is None else group_ids.contiguous(),
            out,
            n,
            out.shape[1] if out.dim() == 2 else 1,
            len(moments),
            EPS=eps,
            BY_ID=group_ids is not None,
            BLOCK=TILE,
            STAT=_scalar_type(out.dtype),
            num_warps=WARPS,
        )


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every kernel as it is launched for fp32 tensors with T a multiple of 16, for a test that
    compiles them for GPUs that the machine does not have."""
    tile = _shape_of_tile(TILE)
    decay = {"GAMMA": 1.0, "LAM": 0.95, "STAT": tl.float32}
    yield grid.aot_case(
        _gae_kernel,
        "gae",
        {"mask": "*i1"},
        {**decay, "HAS_LAST": False, **tile, "rewards_t": 1, "values_t": 1, "mask_t": 1},
    )
    for norm, flat, values in (
        ("none", False, True),
        ("batch", False, True),
        ("group", False, True),
        ("group", True, True),
        ("batch", False, False),
    ):
        yield grid.aot_case(
            _experience_kernel,
            f"experience-{norm}{'-flat' * flat}{'-no-critic' * (not values)}",
            {
                "kept": "*i64" if flat else "*i1",
                "kl_coef": "fp32",
                "cu_seqlens": "*i64" if flat else "*fp32",
                "group_ids": "*i64" if norm == "group" else "*fp32",
                "partials": "*fp64",
                "merged": "*fp64",
                "counter": "*i64",
                # of no use to flat rows, 0 there
                **dict.fromkeys(("logprobs_s", "ref_s", "values_s", "kept_s"), "i32"),
            },
            {
                **decay,
                **dict.fromkeys(("logprobs_t", "ref_t", "values_t", "kept_t"), 1),
                "EPS": 1e-8,
                "ESTIMATOR": "k3" if norm == "none" else "k1",
                "NORM": norm,
                "APPLY": True,
                "HAS_VALUES": values,
                "FLAT": flat,
                "KEPT_IS_TARGET": flat,
                "COEF_PER_SEQUENCE": norm == "group",
                "RESIDENT": norm != "none",
                "BLOCK": BLOCK,
                **_shape_of_tile(TILE, flat),
            },
            maxnreg=MAX_REGISTERS,
        )
    yield grid.aot_case(
        _normalize_kernel,
        "normalize_advantages",
        {"mask": "*i1", "group_ids": "*i64"},
        {"EPS": 1e-8, "BY_ID": True, "BLOCK": TILE, "STAT": tl.float32},
    )
