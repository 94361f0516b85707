"""The Triton kernels of linear_logprobs: statistics of rows, and dZ of a slab of the vocabulary.

Read downward: forward, backward. Importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gikernels.vocabulary import tiles

# --- forward ------------------------------------------------------------------------------------


@triton.jit
def _part_stats(
    raw, col, N, V, rows, target, bias, inner, row_outer, target_z,
    SOFTCAP: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """(peak, total, weighted) of a tile of products, a part of its columns after the other: a tanh
    of all at once would spill."""
    if PARTS == 1:
        cols = col + tl.arange(0, raw.shape[1])
        z = tiles.final_of_raw(raw, bias, cols, V, inner, row_outer, SOFTCAP)
        z = tiles.inside(z, col, V)
        tiles.store_target(z, col, rows, target, target_z)
        peak, total, weighted = tiles.tile_stats(z, PTX)
    else:
        left, right = tiles.halves(raw)
        peak, total, weighted = _part_stats(
            left, col, N, V, rows, target, bias, inner, row_outer, target_z, SOFTCAP, PARTS // 2,
            PTX,
        )  # fmt: skip
        other_peak, other_total, other_weighted = _part_stats(
            right, col + raw.shape[1] // 2, N, V, rows, target, bias, inner, row_outer, target_z,
            SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip
        peak, total, weighted = tiles.merge(
            peak, total, weighted, other_peak, other_total, other_weighted, PTX
        )
    return peak, total, weighted


@triton.jit
def _part_stats_ref(
    raw, ref_raw, col, N, V, rows, target, bias, inner, row_outer, target_z,
    SOFTCAP: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """(peak, total, weighted, ref_peak, ref_total, cross) of a tile of products of both."""
    if PARTS == 1:
        cols = col + tl.arange(0, raw.shape[1])
        z = tiles.final_of_raw(raw, bias, cols, V, inner, row_outer, SOFTCAP)
        z = tiles.inside(z, col, V)
        tiles.store_target(z, col, rows, target, target_z)
        ref_z = tiles.final_of_raw(ref_raw, None, cols, V, inner, row_outer, SOFTCAP)
        ref_z = tiles.inside(ref_z, col, V)
        peak, total, weighted = tiles.tile_stats(z, PTX)
        ref_peak, ref_total, cross = tiles.tile_stats_ref(z, peak, ref_z, PTX)
    else:
        left, right = tiles.halves(raw)
        ref_left, ref_right = tiles.halves(ref_raw)
        peak, total, weighted, ref_peak, ref_total, cross = _part_stats_ref(
            left, ref_left, col, N, V, rows, target, bias, inner, row_outer, target_z, SOFTCAP,
            PARTS // 2, PTX,
        )  # fmt: skip
        other = _part_stats_ref(
            right, ref_right, col + raw.shape[1] // 2, N, V, rows, target, bias, inner, row_outer,
            target_z, SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip
        other_peak, other_total, other_weighted, other_ref_peak, other_ref_total, other_cross = (
            other
        )
        ref_peak, ref_total, cross = tiles.merge_ref(
            peak, total, ref_peak, ref_total, cross,
            other_peak, other_total, other_ref_peak, other_ref_total, other_cross, PTX,
        )  # fmt: skip
        peak, total, weighted = tiles.merge(
            peak, total, weighted, other_peak, other_total, other_weighted, PTX
        )
    return peak, total, weighted, ref_peak, ref_total, cross


@triton.jit
def _store_partial(partials, tile, index, KEEP: tl.constexpr, rows, N, value):
    tl.store(partials + (tile * KEEP + index).to(tl.int64) * N + rows, value, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x,  # (N, D), or its descriptor
    w,  # (V, D)
    targets,  # (N)
    bias,  # (V) or None
    temperatures,  # (N) or None
    blocks,  # (row blocks) int32: those with a row that is not ignored come first
    count,  # (1) int32: how many these are
    partials,  # (col tiles, 3, N), with a reference (col tiles, 6, N) out
    target_z,  # (N) NaN; out where the target is a token
    N,
    V,
    D,
    x_n,
    x_d,
    w_v,
    w_d,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    STAT_PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    ref_x=None,  # (N, D')
    ref_w=None,  # (V, D')
    ref_D=0,
    ref_x_n=0,
    ref_x_d=0,
    ref_w_v=0,
    ref_w_d=0,
    ref_PRECISION: tl.constexpr = "ieee",
):
    """The statistics of one tile of logits an item. Programs take items in turns, rows of a group
    first; blocks of ignored rows cost nothing, and the others are shared evenly."""
    KEEP: tl.constexpr = 3 if ref_x is None else 6
    row_blocks = tl.load(count)
    col_tiles = tl.cdiv(V, COLS)
    items = row_blocks * col_tiles
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        place, tile = tiles.grouped(item, row_blocks, col_tiles, GROUP)
        row, col = tl.load(blocks + place) * ROWS, tile * COLS
        rows = row + tl.arange(0, ROWS)
        z = tiles.product_tile(
            x, w, row, col, N, V, D, x_n, x_d, w_v, w_d, ROWS, COLS, DEPTH, TMA, PRECISION
        )
        target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int64)
        target = tiles.narrow(target, V)
        row_outer = tiles.row_outer(temperatures, rows, N, outer)
        if ref_x is not None:
            ref_z = tiles.product_tile(
                ref_x, ref_w, row, col, N, V, ref_D, ref_x_n, ref_x_d, ref_w_v, ref_w_d,
                ROWS, COLS, DEPTH, TMA, ref_PRECISION,
            )  # fmt: skip
            peak, total, weighted, ref_peak, ref_total, cross = _part_stats_ref(
                z, ref_z, col, N, V, rows, target, bias, inner, row_outer, target_z, SOFTCAP,
                STAT_PARTS, PTX,
            )  # fmt: skip
            _store_partial(partials, tile, 3, KEEP, rows, N, ref_peak)
            _store_partial(partials, tile, 4, KEEP, rows, N, ref_total)
            _store_partial(partials, tile, 5, KEEP, rows, N, cross)
        else:
            peak, total, weighted = _part_stats(
                z, col, N, V, rows, target, bias, inner, row_outer, target_z, SOFTCAP,
                STAT_PARTS, PTX,
            )  # fmt: skip
        _store_partial(partials, tile, 0, KEEP, rows, N, peak)
        _store_partial(partials, tile, 1, KEEP, rows, N, total)
        _store_partial(partials, tile, 2, KEEP, rows, N, weighted)


@triton.jit
def _load_partials(partials, at, index, KEEP: tl.constexpr, rows, N, mask, other):
    start = partials + (at * KEEP + index).to(tl.int64)[:, None] * N
    return tl.load(start + rows[None, :], mask=mask, other=other)


@triton.jit(do_not_specialize=["N", "col_tiles", "stats_n", "ignore_index"])
def merge_kernel(
    partials,  # (col tiles, 3, N), with a reference (col tiles, 6, N)
    target_z,  # (N)
    targets,  # (N)
    logprobs,  # (N) out
    entropy,  # (N) out
    kl,  # (N) out
    stats,  # (3, stats_n) or (6, stats_n) out: peak, total, weighted, ref_peak, ref_total, cross
    N,
    col_tiles,
    stats_n,
    ignore_index,
    HAS_REF: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
):
    """The tiles of a few rows, in order, so that the result does not depend on who made them."""
    KEEP: tl.constexpr = 6 if HAS_REF else 3
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    ref_peak = tl.full((ROWS,), float("-inf"), tl.float32)
    ref_total = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, col_tiles, TILES):
        at = first + tl.arange(0, TILES)
        mask = (at < col_tiles)[:, None] & inside[None, :]
        tile_peak = _load_partials(partials, at, 0, KEEP, rows, N, mask, float("-inf"))
        tile_total = _load_partials(partials, at, 1, KEEP, rows, N, mask, 0.0)
        tile_weighted = _load_partials(partials, at, 2, KEEP, rows, N, mask, 0.0)
        new_peak = tl.maximum(peak, tl.max(tile_peak, 0))
        d, e = tiles.shift(peak, new_peak), tiles.shift(tile_peak, new_peak[None, :])
        scale, tile_scale = tiles.exp(d, PTX), tiles.exp(e, PTX)
        if HAS_REF:
            tile_ref_peak = _load_partials(partials, at, 3, KEEP, rows, N, mask, float("-inf"))
            tile_ref_total = _load_partials(partials, at, 4, KEEP, rows, N, mask, 0.0)
            tile_cross = _load_partials(partials, at, 5, KEEP, rows, N, mask, 0.0)
            new_ref = tl.maximum(ref_peak, tl.max(tile_ref_peak, 0))
            ref_d = tiles.shift(ref_peak, new_ref)
            ref_e = tiles.shift(tile_ref_peak, new_ref[None, :])
            # A tile without a token that can be drawn adds nothing, however far it lies off.
            part = tl.where(tile_total > 0, tile_cross + tile_total * (e - ref_e), 0.0)
            cross = scale * (cross + total * (d - ref_d)) + tl.sum(tile_scale * part, 0)
            ref_total = tiles.exp(ref_d, PTX) * ref_total
            ref_total += tl.sum(tiles.exp(ref_e, PTX) * tile_ref_total, 0)
            ref_peak = new_ref
        weighted = scale * (weighted + total * d)
        weighted += tl.sum(tile_scale * (tile_weighted + tile_total * e), 0)
        total = scale * total + tl.sum(tile_scale * tile_total, 0)
        peak = new_peak

    # Of ignored rows no tile need have been looked at: whatever stands there is not read.
    kept = inside & (tl.load(targets + rows, mask=inside, other=0) != ignore_index)
    peak, weighted = tl.where(kept, peak, 0.0), tl.where(kept, weighted, 0.0)
    total = tl.where(kept, total, 1.0)
    own = tl.load(target_z + rows, mask=kept, other=0.0)
    tl.store(logprobs + rows, own - peak - tl.log(total), mask=inside)
    tl.store(entropy + rows, tiles.entropy_of(total, weighted), mask=inside)
    tl.store(stats + rows, peak, mask=inside)
    tl.store(stats + stats_n + rows, total, mask=inside)
    tl.store(stats + 2 * stats_n + rows, weighted, mask=inside)
    if HAS_REF:
        ref_peak, cross = tl.where(kept, ref_peak, 0.0), tl.where(kept, cross, 0.0)
        ref_total = tl.where(kept, ref_total, 1.0)
        tl.store(kl + rows, tiles.kl_of(total, ref_total, cross), mask=inside)
        tl.store(stats + 3 * stats_n + rows, ref_peak, mask=inside)
        tl.store(stats + 4 * stats_n + rows, ref_total, mask=inside)
        tl.store(stats + 5 * stats_n + rows, cross, mask=inside)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _row(per_row, index, rows, N):
    return tl.load(per_row + index * N + rows, mask=rows < N, other=0.0)[:, None]


@triton.jit
def _store_parts(
    raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias, temperatures,
    per_row, inner, outer, SOFTCAP: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """dZ of a tile of products, a part of its columns after the other: all at once would spill."""
    if PARTS == 1:
        _store_dlogits(
            raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias,
            temperatures, per_row, inner, outer, SOFTCAP, PTX,
        )  # fmt: skip
    else:
        left, right = tiles.halves(raw)
        ref_left, ref_right = None, None
        if ref_raw is not None:
            ref_left, ref_right = tiles.halves(ref_raw)
        _store_parts(
            left, ref_left, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias,
            temperatures, per_row, inner, outer, SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip
        _store_parts(
            right, ref_right, dz, dz_n, row, col + raw.shape[1] // 2, col_start, col_end, N, V,
            targets, bias, temperatures, per_row, inner, outer, SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip


@triton.jit
def _store_dlogits(
    raw, ref_raw, dz, dz_n, row, col, col_start, col_end, N, V, targets, bias, temperatures,
    per_row, inner, outer, SOFTCAP: tl.constexpr, PTX: tl.constexpr,
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
        PTX,
    )
    if ref_raw is not None:
        ref_z = tiles.final_of_raw(ref_raw, None, cols, V, inner, row_outer, SOFTCAP)
        log_q = ref_z - _row(per_row, 6, rows, N) - _row(per_row, 7, rows, N)
        g_kl, kl = _row(per_row, 8, rows, N), _row(per_row, 9, rows, N)
        grad += tiles.dlogits_kl(log_p, log_q, g_kl, kl, PTX)
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
    PTX: tl.constexpr,
    FLATTEN: tl.constexpr,
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
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
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
            temperatures, per_row, inner, outer, SOFTCAP, PARTS, PTX,
        )  # fmt: skip
