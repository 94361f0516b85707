"""The Triton kernels over the steps of sequences.

`experience` is one launch. A program walks whole sequences from their last block to their first
and carries what the next block needs: what the step right of it passes on. A masked step is the
identity of the scan, so holes and ragged ends need no compaction. The moments of the
advantages meet in the same launch (`grid.arrive`), and it normalises before it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gikernels.backends import grid
from gikernels.sequence import experience_parts as parts


@triton.jit(do_not_specialize=["rewards_s", "values_s", "mask_s", "S", "T"])
def gae_kernel(
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
    gamma: tl.float64,
    lam: tl.float64,
    HAS_LAST: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    STAT: tl.constexpr,
):
    gamma, lam = tl.full((), gamma, STAT), tl.full((), lam, STAT)
    seq = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, length = parts.extent(seq, S, T, 0, seq, False)
    centre = tl.zeros((ROWS,), STAT)
    passed = tl.zeros((ROWS,), STAT)
    ended = tl.zeros((ROWS,), tl.int32)
    beyond = None
    if HAS_LAST:
        beyond = tl.load(last_values + seq, mask=seq < S, other=0).to(STAT)
    blocks = tl.cdiv(T, BT)
    for back in range(blocks):
        t = (blocks - 1 - back) * BT + tl.arange(0, BT)
        inside = t[None, :] < length[:, None]
        keep = parts.load(mask, mask_s, mask_t, seq, start, t, inside, False)
        keep = parts.kept(keep, inside, 0, False)
        reward = parts.load(rewards, rewards_s, rewards_t, seq, start, t, inside, False).to(STAT)
        value = parts.load(values, values_s, values_t, seq, start, t, inside, False).to(STAT)
        value = tl.where(keep, value, 0.0)
        last = tl.max(tl.where(keep, t[None, :], -1), 1)
        ends = (t[None, :] == last[:, None]) & keep & (ended == 0)[:, None]
        ended = tl.where(last >= 0, 1, ended)
        out = start[:, None] + t[None, :]
        advantage, centre, passed = parts.gae_tile(
            tl.where(keep, reward, 0.0), value, keep, ends, beyond, centre, passed, gamma, lam,
            advantages + out, inside, DIVIDE,
        )  # fmt: skip
        tl.store(advantages + out, advantage, mask=inside)
        tl.store(returns + out, advantage + value, mask=inside)


@triton.jit(
    do_not_specialize=[
        "logprobs_s",
        "ref_s",
        "values_s",
        "kept_s",
        "S",
        "T",
        "N",
        "G",
        "ignore_index",
    ]
)
def experience_kernel(
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
    gamma: tl.float64,
    lam: tl.float64,
    eps: tl.float64,
    ESTIMATOR: tl.constexpr,  # k1, k2, k3 or exact
    NORM: tl.constexpr,  # none, batch, group
    APPLY: tl.constexpr,  # normalise here, or leave it to normalize_advantages
    HAS_VALUES: tl.constexpr,
    DIVIDE: tl.constexpr,
    FLAT: tl.constexpr,
    KEPT_IS_TARGET: tl.constexpr,
    COEF_PER_SEQUENCE: tl.constexpr,
    RESIDENT: tl.constexpr,  # all programs run at once and can wait for each other
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    STAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gamma, lam = tl.full((), gamma, STAT), tl.full((), lam, STAT)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(S, ROWS)
    batch_count = tl.zeros((ROWS,), tl.float64)
    batch_mean = tl.zeros((ROWS,), tl.float64)
    batch_m2 = tl.zeros((ROWS,), tl.float64)

    for tile in range(program, tiles, programs):
        seq = tile * ROWS + tl.arange(0, ROWS)
        real = seq < S
        start, length = parts.extent(seq, S, T, N, cu_seqlens, FLAT)
        score = tl.load(scores + seq, mask=real, other=0).to(STAT)
        coef = tl.zeros((ROWS,), STAT) + kl_coef
        if COEF_PER_SEQUENCE:
            coef = tl.load(kl_coefs + seq, mask=real, other=0).to(STAT)
        centre = tl.zeros((ROWS,), STAT)
        passed = tl.zeros((ROWS,), STAT)
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
            keep = parts.load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
            estimate = parts.load(logprobs, logprobs_s, logprobs_t, seq, start, t, inside, FLAT)
            estimate = estimate.to(STAT)
            if ESTIMATOR != "exact":
                ref = parts.load(ref_logprobs, ref_s, ref_t, seq, start, t, inside, FLAT).to(STAT)
            if HAS_VALUES:
                value = parts.load(values, values_s, values_t, seq, start, t, inside, FLAT).to(STAT)
            keep = parts.kept(keep, inside, ignore_index, KEPT_IS_TARGET)
            if ESTIMATOR != "exact":
                estimate = parts.kl_estimate(tl.where(keep, estimate - ref, 0.0), ESTIMATOR)
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
                advantage, centre, passed = parts.gae_tile(
                    reward, value, keep, pays, None, centre, passed, gamma, lam,
                    advantages + out, inside, DIVIDE,
                )  # fmt: skip
                tl.store(advantages + out, advantage, mask=inside)
                tl.store(returns + out, advantage + value, mask=inside)
                if NORM != "none":
                    tile_count, tile_mean, tile_m2 = parts.tile_moments(advantage, keep)
                    count, mean, m2 = parts.merge(count, mean, m2, tile_count, tile_mean, tile_m2)
            else:
                total += tl.sum(reward, 1)
                count += tl.sum(keep.to(tl.int32), 1).to(tl.float64)
        tl.store(seq_kl + seq, sum_kl, mask=real)

        if not HAS_VALUES:  # every token's advantage is the sum, known only now
            mean = tl.where(count > 0, total.to(tl.float64), 0.0)
            for block in range(blocks):
                t = block * BT + tl.arange(0, BT)
                inside = t[None, :] < length[:, None]
                keep = parts.load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
                keep = parts.kept(keep, inside, ignore_index, KEPT_IS_TARGET)
                spread = tl.where(keep, total[:, None], 0.0)
                out = start[:, None] + t[None, :]
                tl.store(advantages + out, spread, mask=inside)
                tl.store(returns + out, spread, mask=inside)

        if NORM == "group":
            tl.store(partials + seq, count, mask=real)
            tl.store(partials + S + seq, mean, mask=real)
            tl.store(partials + 2 * S + seq, m2, mask=real)
        elif NORM == "batch":
            batch_count, batch_mean, batch_m2 = parts.merge(
                batch_count, batch_mean, batch_m2, count, mean, m2
            )

    if NORM == "none":
        if program == 0:
            for column in tl.static_range(3):
                tl.store(moments + column, 0.0)
    else:
        if NORM == "batch":
            own_count, own_mean, own_m2 = parts.merge_all(batch_count, batch_mean, batch_m2)
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
            count, mean, m2 = parts.merge_group(
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
                start, length = parts.extent(seq, S, T, N, cu_seqlens, FLAT)
                group = seq * 0
                known = real
                if NORM == "group":
                    group = tl.load(group_ids + seq, mask=real, other=0)
                    known = real & (group >= 0) & (group < G)
                unknown = float("nan")  # what a group id out of range makes of its sequence
                count = tl.load(merged + group, mask=known, other=unknown)
                mean = tl.load(merged + G + group, mask=known, other=unknown)
                m2 = tl.load(merged + 2 * G + group, mask=known, other=unknown)
                scale = (1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps)).to(STAT)
                # In two parts: at an offset of 1e6 one float32 would be wrong by 0.03.
                high = mean.to(STAT)
                low = (mean - high.to(tl.float64)).to(STAT)
                for block in range(tl.cdiv(tl.max(length, 0), BT)):
                    t = block * BT + tl.arange(0, BT)
                    inside = t[None, :] < length[:, None]
                    keep = parts.load(kept, kept_s, kept_t, seq, start, t, inside, FLAT)
                    keep = parts.kept(keep, inside, ignore_index, KEPT_IS_TARGET)
                    out = advantages + start[:, None] + t[None, :]
                    x = tl.load(out, mask=inside, other=0)
                    x = ((x - high[:, None]) - low[:, None]) * scale[:, None]
                    tl.store(out, tl.where(keep, x, 0.0), mask=inside)


@triton.jit(do_not_specialize=["n", "T", "G"])
def normalize_kernel(
    advantages,  # (n) contiguous
    mask,  # (n) contiguous
    moments,  # (G, 3) contiguous
    group_ids,  # (n / T)
    out,  # (n)
    n,
    T,
    G,
    eps: tl.float64,
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
    x = (x - mean) / tl.sqrt(m2 / tl.maximum(count, 1.0) + tl.full((), eps, STAT))
    keep = tl.load(mask + i, mask=inside, other=0) != 0
    tl.store(out + i, tl.where(keep, x, 0.0), mask=inside)
