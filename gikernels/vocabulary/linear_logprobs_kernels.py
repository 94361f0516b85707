"""The Triton kernels of linear_logprobs: statistics of rows, and dZ of a slab of the vocabulary.

Read downward: forward, backward. Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gikernels.vocabulary import tiles

# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _store_partial(partials, index, rows, N, value):
    tl.store(partials + index.to(tl.int64) * N + rows, value, mask=rows < N)


@triton.jit
def _load_partial(partials, index, rows, N):
    # .cg: from the second-level cache, where the other programs' stores are.
    at = partials + index.to(tl.int64) * N + rows
    return tl.load(at, mask=rows < N, other=0.0, cache_modifier=".cg")


@triton.jit
def _absorb_parts(
    raw, col, V, target, bias, inner, row_outer, peak, total, weighted, target_z,
    SOFTCAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A part of a tile's columns after the other: a tanh of all at once would spill."""
    if PARTS == 1:
        cols = col + tl.arange(0, raw.shape[1])
        z = tiles.final_of_raw(raw, bias, cols, V, inner, row_outer, SOFTCAP)
        z = tl.where((cols < V)[None, :], z, float("-inf"))
        target_z += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        peak, total, weighted = tiles.absorb(peak, total, weighted, z)
    else:
        left, right = tiles.halves(raw)
        peak, total, weighted, target_z = _absorb_parts(
            left, col, V, target, bias, inner, row_outer, peak, total, weighted, target_z,
            SOFTCAP, PARTS // 2,
        )  # fmt: skip
        peak, total, weighted, target_z = _absorb_parts(
            right, col + raw.shape[1] // 2, V, target, bias, inner, row_outer, peak, total,
            weighted, target_z, SOFTCAP, PARTS // 2,
        )  # fmt: skip
    return peak, total, weighted, target_z


@triton.jit(do_not_specialize=["N", "splits", "ignore_index"])
def forward_kernel(
    x,  # (N, D), or its descriptor
    w,  # (V, D)
    targets,  # (N)
    bias,  # (V) or None
    temperatures,  # (N) or None
    partials,  # (splits, 4, N), with a reference (splits, 7, N)
    arrivals,  # (row blocks) zeros, and zeros again at the end
    logprobs,  # (N) out
    entropy,  # (N) out
    kl,  # (N) out
    stats,  # (3, N) or (6, N) out: peak, total, weighted, ref_peak, ref_total, cross
    N,
    V,
    D,
    x_n,
    x_d,
    w_v,
    w_d,
    splits,
    inner,
    outer,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ref_x=None,  # (N, D')
    ref_w=None,  # (V, D')
    ref_D=0,
    ref_x_n=0,
    ref_x_d=0,
    ref_w_v=0,
    ref_w_d=0,
    ref_PRECISION: tl.constexpr = "ieee",
):
    """Work is cut into row blocks x splits of the vocabulary. A program walks one split of one row
    block with the statistics in registers and leaves them in `partials`; the last of a row block to
    arrive merges its splits, in order, so that the result does not depend on who that is."""
    HAS_REF: tl.constexpr = ref_x is not None
    KEEP: tl.constexpr = 7 if HAS_REF else 4
    row_blocks = tl.cdiv(N, ROWS)
    col_tiles = tl.cdiv(V, COLS)
    for item in tl.range(tl.program_id(0), row_blocks * splits, tl.num_programs(0), flatten=False):
        block, split = tiles.grouped(item, row_blocks, splits, GROUP)
        row = block * ROWS
        rows = row + tl.arange(0, ROWS)
        target = tl.load(targets + rows, mask=rows < N, other=0).to(tl.int64)
        kept = (rows < N) & (target != ignore_index)
        target = tiles.narrow(target, V)
        row_outer = tiles.row_outer(temperatures, rows, N, outer)

        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        weighted = tl.zeros((ROWS,), tl.float32)
        target_z = tl.zeros((ROWS,), tl.float32)
        ref_peak = tl.full((ROWS,), float("-inf"), tl.float32)
        ref_total = tl.zeros((ROWS,), tl.float32)
        cross = tl.zeros((ROWS,), tl.float32)
        first = split * col_tiles // splits
        end = (split + 1) * col_tiles // splits
        any_kept = tl.max(kept.to(tl.int32), 0) > 0  # a block of ignored rows costs nothing
        for tile in tl.range(first, tl.where(any_kept, end, first), flatten=False):
            col = tile * COLS
            cols = col + tl.arange(0, COLS)
            z = tiles.product_tile(
                x, w, row, col, N, V, D, x_n, x_d, w_v, w_d, ROWS, COLS, DEPTH, TMA, PRECISION
            )
            if HAS_REF:
                z = tiles.final_of_raw(z, bias, cols, V, inner, row_outer, SOFTCAP)
                z = tl.where((cols < V)[None, :], z, float("-inf"))
                target_z += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
                ref_z = tiles.product_tile(
                    ref_x, ref_w, row, col, N, V, ref_D, ref_x_n, ref_x_d, ref_w_v, ref_w_d,
                    ROWS, COLS, DEPTH, TMA, ref_PRECISION,
                )  # fmt: skip
                ref_z = tiles.final_of_raw(ref_z, None, cols, V, inner, row_outer, SOFTCAP)
                ref_z = tl.where((cols < V)[None, :], ref_z, float("-inf"))
                ref_peak, ref_total, cross = tiles.absorb_ref(
                    peak, total, ref_peak, ref_total, cross, z, ref_z
                )
                peak, total, weighted = tiles.absorb(peak, total, weighted, z)
            else:
                peak, total, weighted, target_z = _absorb_parts(
                    z, col, V, target, bias, inner, row_outer, peak, total, weighted, target_z,
                    SOFTCAP, 2 if SOFTCAP else 1,
                )  # fmt: skip

        part = split * KEEP
        _store_partial(partials, part, rows, N, peak)
        _store_partial(partials, part + 1, rows, N, total)
        _store_partial(partials, part + 2, rows, N, weighted)
        _store_partial(partials, part + 3, rows, N, target_z)
        if HAS_REF:
            _store_partial(partials, part + 4, rows, N, ref_peak)
            _store_partial(partials, part + 5, rows, N, ref_total)
            _store_partial(partials, part + 6, rows, N, cross)
        # Every thread's stores come before the one thread's atomic, which releases them.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel")
        if arrived == splits - 1:
            tl.debug_barrier()
            tl.store(arrivals + block, 0)
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            weighted = tl.zeros((ROWS,), tl.float32)
            target_z = tl.zeros((ROWS,), tl.float32)
            ref_peak = tl.full((ROWS,), float("-inf"), tl.float32)
            ref_total = tl.zeros((ROWS,), tl.float32)
            cross = tl.zeros((ROWS,), tl.float32)
            for s in tl.range(0, splits, flatten=False):
                part = s * KEEP
                new_peak = _load_partial(partials, part, rows, N)
                new_total = _load_partial(partials, part + 1, rows, N)
                new_weighted = _load_partial(partials, part + 2, rows, N)
                target_z += _load_partial(partials, part + 3, rows, N)
                if HAS_REF:
                    new_ref_peak = _load_partial(partials, part + 4, rows, N)
                    new_ref_total = _load_partial(partials, part + 5, rows, N)
                    new_cross = _load_partial(partials, part + 6, rows, N)
                    ref_peak, ref_total, cross = tiles.merge_ref(
                        peak, total, ref_peak, ref_total, cross,
                        new_peak, new_total, new_ref_peak, new_ref_total, new_cross,
                    )  # fmt: skip
                peak, total, weighted = tiles.merge(
                    peak, total, weighted, new_peak, new_total, new_weighted
                )
            # A target outside the vocabulary was never met: NaN, not a plausible number.
            target_z = tl.where(target >= 0, target_z, float("nan"))
            logprob = target_z - peak - tl.log(total)
            inside = rows < N
            tl.store(logprobs + rows, tl.where(kept, logprob, 0.0), mask=inside)
            tl.store(
                entropy + rows, tl.where(kept, tiles.entropy_of(total, weighted), 0.0), mask=inside
            )
            tl.store(stats + rows, peak, mask=inside)
            tl.store(stats + N + rows, total, mask=inside)
            tl.store(stats + 2 * N + rows, weighted, mask=inside)
            if HAS_REF:
                exact = tl.where(kept, tiles.kl_of(total, ref_total, cross), 0.0)
                tl.store(kl + rows, exact, mask=inside)
                tl.store(stats + 3 * N + rows, ref_peak, mask=inside)
                tl.store(stats + 4 * N + rows, ref_total, mask=inside)
                tl.store(stats + 5 * N + rows, cross, mask=inside)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _row(per_row, index, rows, N):
    return tl.load(per_row + index * N + rows, mask=rows < N, other=0.0)[:, None]


@triton.jit
def _store_parts(
    raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias, temperatures,
    per_row, inner, outer, SOFTCAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dZ of a tile of products, a part of its columns after the other: all at once would spill."""
    if PARTS == 1:
        _store_dlogits(
            raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias,
            temperatures, per_row, inner, outer, SOFTCAP,
        )  # fmt: skip
    else:
        left, right = tiles.halves(raw)
        ref_left, ref_right = None, None
        if ref_raw is not None:
            ref_left, ref_right = tiles.halves(ref_raw)
        _store_parts(
            left, ref_left, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias,
            temperatures, per_row, inner, outer, SOFTCAP, PARTS // 2,
        )  # fmt: skip
        _store_parts(
            right, ref_right, dz, dz_n, row, col + raw.shape[1] // 2, col_start, col_end, N, V,
            targets, bias, temperatures, per_row, inner, outer, SOFTCAP, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _store_dlogits(
    raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias, temperatures,
    per_row, inner, outer, SOFTCAP: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, raw.shape[0])
    cols = col + tl.arange(0, raw.shape[1])
    row_outer = tiles.row_outer(temperatures, rows, N, outer)
    z = tiles.final_of_raw(raw, bias, cols, V, inner, row_outer, SOFTCAP)
    # Peak and log(total) one after the other: their sum would round at a large offset.
    log_p = z - _row(per_row, 0, rows, N) - _row(per_row, 1, rows, N)
    # The target's is the forward's: 1 - p of a confident policy is smaller than z's rounding.
    target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int64)
    is_target = cols[None, :] == tiles.narrow(target, V)[:, None]
    log_p = tl.where(is_target, _row(per_row, 5, rows, N), log_p)
    grad = tiles.dlogits(
        log_p,
        is_target,
        _row(per_row, 2, rows, N),
        _row(per_row, 3, rows, N),
        _row(per_row, 4, rows, N),
    )
    if ref_raw is not None:
        ref_z = tiles.final_of_raw(ref_raw, None, cols, V, inner, row_outer, SOFTCAP)
        log_q = ref_z - _row(per_row, 6, rows, N) - _row(per_row, 7, rows, N)
        grad += tiles.dlogits_kl(log_p, log_q, _row(per_row, 8, rows, N), _row(per_row, 9, rows, N))
    grad *= tiles.logit_slope(z, inner, row_outer, SOFTCAP)
    # 64 bits for where the tile starts, 32 within it: half the registers for addresses.
    start = dz + row.to(tl.int64) * dz_n + (col - col_start)
    at = start + ((rows - row)[:, None] * dz_n + (cols - col)[None, :])
    inside = (rows < N)[:, None] & (cols < col_end)[None, :]
    tl.store(at, grad.to(dz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def dlogits_kernel(
    x,  # (N, D), or its descriptor
    w,  # (V, D)
    targets,  # (N)
    bias,  # (V) or None
    temperatures,  # (N) or None
    per_row,  # (6, N) or (10, N) fp32, see `_per_row`
    dz,  # (N, col_end - col_start) out, rows dz_n apart
    N,
    V,
    D,
    x_n,
    x_d,
    w_v,
    w_d,
    dz_n,
    col_start,
    col_end,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    ref_x=None,  # (N, D')
    ref_w=None,  # (V, D')
    ref_D=0,
    ref_x_n=0,
    ref_x_d=0,
    ref_w_v=0,
    ref_w_d=0,
    ref_PRECISION: tl.constexpr = "ieee",
):
    """The gradient of hidden @ weight.T + bias for a slab of the vocabulary."""
    row_blocks = tl.cdiv(N, ROWS)
    col_tiles = tl.cdiv(col_end - col_start, COLS)
    items = row_blocks * col_tiles
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=False):
        block, tile = tiles.grouped(item, row_blocks, col_tiles, GROUP)
        row = block * ROWS
        col = col_start + tile * COLS
        raw = tiles.product_tile(
            x, w, row, col, N, V, D, x_n, x_d, w_v, w_d, ROWS, COLS, DEPTH, TMA, PRECISION
        )
        ref_raw = None
        if ref_x is not None:
            ref_raw = tiles.product_tile(
                ref_x, ref_w, row, col, N, V, ref_D, ref_x_n, ref_x_d, ref_w_v, ref_w_d,
                ROWS, COLS, DEPTH, TMA, ref_PRECISION,
            )  # fmt: skip
        _store_parts(
            raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias,
            temperatures, per_row, inner, outer, SOFTCAP, PARTS,
        )  # fmt: skip
