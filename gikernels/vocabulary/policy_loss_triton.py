"""The Triton half of linear_policy_loss: the logits of a chunk of rows as exponentials, then dZ.

Imported when the first kernel is launched. Logits in 16 bits would ruin PPO's ratios (0.06 nat at
|z| = 20). So what is kept of a logit is exp(z - the largest of its few neighbours in the row): its
rounding is relative, and the statistics and the target's logit are taken in fp32 before it.

Read downward: exponentials kernel, dZ kernel, scaling kernel, the loop over chunks, cases for
ahead-of-time compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid
from gikernels.backends.settings import workspace_for
from gikernels.vocabulary import launch, tiles
from gikernels.vocabulary.head import Head, RowStats, spans
from gikernels.vocabulary.policy_loss_terms import Recipe, Tokens, active_rows

DLOGITS_ROWS = 32


@triton.jit(do_not_specialize=["N"])
def _exps_kernel(
    x,  # (N, D), or its descriptor
    w,  # (V, D)
    targets,  # (N)
    bias,  # (V) or None
    temperatures,  # (N) or None
    exps,  # (N, V) out, rows exps_n apart: exp(z - the peak of its segment)
    segments,  # (3, N, S) out: peak, total, weighted of each segment of COLS / PARTS columns
    target_z,  # (N) out
    N,
    V,
    D,
    x_n,
    x_d,
    w_v,
    w_d,
    exps_n,
    S,
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
):
    row_blocks = tl.cdiv(N, ROWS)
    col_tiles = tl.cdiv(V, COLS)
    items = row_blocks * col_tiles
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        block, tile = tiles.grouped(item, row_blocks, col_tiles, GROUP)
        row, col = block * ROWS, tile * COLS
        raw = tiles.product_tile(
            x, w, row, col, N, V, D, x_n, x_d, w_v, w_d, ROWS, COLS, DEPTH, TMA, PRECISION
        )
        _store_parts(
            raw, row, col, N, V, S, targets, bias, temperatures, exps, exps_n, segments, target_z,
            inner, outer, SOFTCAP, PARTS, PTX,
        )  # fmt: skip


@triton.jit
def _store_parts(
    raw, row, col, N, V, S, targets, bias, temperatures, exps, exps_n, segments, target_z,
    inner, outer, SOFTCAP: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A part of the columns after the other: all at once would spill."""
    if PARTS == 1:
        _store_exps(
            raw, row, col, N, V, S, targets, bias, temperatures, exps, exps_n, segments, target_z,
            inner, outer, SOFTCAP, PTX,
        )  # fmt: skip
    else:
        left, right = tiles.halves(raw)
        _store_parts(
            left, row, col, N, V, S, targets, bias, temperatures, exps, exps_n, segments, target_z,
            inner, outer, SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip
        _store_parts(
            right, row, col + raw.shape[1] // 2, N, V, S, targets, bias, temperatures, exps, exps_n,
            segments, target_z, inner, outer, SOFTCAP, PARTS // 2, PTX,
        )  # fmt: skip


@triton.jit
def _store_exps(
    raw, row, col, N, V, S, targets, bias, temperatures, exps, exps_n, segments, target_z,
    inner, outer, SOFTCAP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, raw.shape[0])
    cols = col + tl.arange(0, raw.shape[1])
    row_outer = tiles.row_outer(temperatures, rows, N, outer)
    z = tiles.final_of_raw(raw, bias, cols, V, inner, row_outer, SOFTCAP)
    z = tiles.inside(z, col, V)
    target = tiles.narrow(tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int64), V)
    tiles.store_target(z, col, rows, target, target_z)
    peak, total, weighted = tiles.tile_stats(z, PTX)
    at = segments + rows.to(tl.int64) * S + col // raw.shape[1]
    plane = tl.full((), 1, tl.int64) * N * S
    some = (rows < N) & (col < V)
    tl.store(at, peak, mask=some)
    tl.store(at + plane, total, mask=some)
    tl.store(at + 2 * plane, weighted, mask=some)
    start = exps + row.to(tl.int64) * exps_n + col
    to = start + ((rows - row)[:, None] * exps_n + (cols - col)[None, :])
    kept = tiles.exp(tiles.below_peak(z, peak), PTX).to(exps.dtype.element_ty)
    tl.store(to, kept, mask=(rows < N)[:, None] & (cols < V)[None, :])


@triton.jit(do_not_specialize=["n"])
def _dlogits_kernel(
    exps,  # (N, V), rows exps_n apart: read
    dz,  # the same memory, perhaps of another 16-bit type: written
    peaks,  # (N, S) of the segments
    source,  # (n): the row of exps that becomes row i of dz
    targets,  # (n), as all that follows
    per_row,  # (6, n): peak, log total, g_logprob, g_entropy, entropy, target's z
    temperatures,  # (n) or None
    n,
    V,
    S,
    exps_n,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PTX: tl.constexpr,
):
    """One segment of some rows. Row i is read from source[i], which is i or, where row i has no
    gradient, a row beyond n: nobody writes where another program reads."""
    row = tl.program_id(1) * ROWS
    col = tl.program_id(0) * SEGMENT
    i = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, SEGMENT)
    inside = (i < n)[:, None] & (cols < V)[None, :]
    src = tl.load(source + i, mask=i < n, other=0).to(tl.int64)
    e = tl.load(exps + src[:, None] * exps_n + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    segment_peak = tl.load(peaks + src * S + tl.program_id(0), mask=i < n, other=0.0)
    target = tl.load(targets + i, mask=i < n, other=-1).to(tl.int64)
    outer_row = tiles.row_outer(temperatures, i, n, outer)
    at = per_row + i[:, None]
    row_mask = (i < n)[:, None]
    peak = tl.load(at, mask=row_mask, other=0.0)
    log_total = tl.load(at + n, mask=row_mask, other=0.0)
    g_logprob = tl.load(at + 2 * n, mask=row_mask, other=0.0)
    g_entropy = tl.load(at + 3 * n, mask=row_mask, other=0.0)
    entropy = tl.load(at + 4 * n, mask=row_mask, other=0.0)
    target_z = tl.load(at + 5 * n, mask=row_mask, other=0.0)
    # log(0) is -inf, a probability of 0. The target's logit is the exact one: where the policy is
    # confident, 1 - p[target] is small and must not come from a rounded exponential.
    is_target = cols[None, :] == tiles.narrow(target, V)[:, None]
    z = tl.where(is_target, target_z, tl.log(e) + segment_peak[:, None])
    log_p = z - peak - log_total
    grad = tiles.dlogits(log_p, is_target, g_logprob, g_entropy, entropy, PTX)
    slope = tiles.logit_slope(z, inner, outer_row, SOFTCAP)
    grad = tl.where(grad != 0, grad * slope, 0.0)
    tl.store(
        dz + i.to(tl.int64)[:, None] * exps_n + cols[None, :],
        grad.to(dz.dtype.element_ty),
        mask=inside,
    )


# --- the loop over chunks -----------------------------------------------------------------------


def chunked(
    hidden: Tensor,  # (N, D), only rows that count
    tokens: Tokens,
    head: Head,
    recipe: Recipe,
    scale: Tensor,  # () what the gradients are multiplied by
    wanted: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Log-probabilities and entropies (N), and the gradients of hidden, weight and bias."""
    n, v, device = len(hidden), len(head.weight), hidden.device
    block = launch.blocks_for(hidden, head.weight)
    segment = block.cols // block.parts
    exps_dtype = torch.float32 if launch.scratch_dtype(hidden) == torch.float32 else torch.bfloat16
    tall, wide = _chunk_shape(n, v, workspace_for(device), exps_dtype.itemsize, block)
    exps = torch.empty(tall, wide, dtype=exps_dtype, device=device)[:, :v]
    sums = launch.Gradients(hidden, head.weight, -(-n // tall), wanted)
    logprobs, entropy = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    for rows in spans(n, tall):
        x, some = hidden[rows], tokens.rows(rows)
        stats, peaks, target_z = _exps(x, some, head, block, exps)
        logprobs[rows] = target_z - stats.peak - stats.total.log()
        entropy[rows] = stats.entropy
        if not any(wanted):
            continue
        slope = recipe.slope(logprobs[rows], some)
        source = _fill_holes(active_rows(slope, recipe), len(x))
        if len(source) == 0:
            continue
        per_row = torch.stack(
            [
                stats.peak,
                stats.total.log(),
                slope * scale,
                recipe.entropy_slope(slope, some) * scale,
                stats.entropy,
                target_z,
            ]
        )[:, source]
        dz = _dlogits(exps, hidden.dtype, peaks, source, some.rows(source), per_row, head, segment)
        if len(source) < len(x):
            x = x[source]
        sums.add(rows.start + source, x, dz)
    return logprobs, entropy, sums.all()


def _chunk_shape(
    n: int, v: int, workspace: int, itemsize: int, block: launch.Blocks
) -> tuple[int, int]:
    """Rows of a chunk whose exponentials and segments fit, and the distance of two rows.

    Rows are 16 bytes apart at least, as the products want, and come in whole tiles: 896 at
    V 128256 and 256 MiB, 3712 at 1 GiB. dW in fp32 is read and written once for each but the first.
    """
    wide = -(-v // 16) * 16
    segments = -(-v // (block.cols // block.parts))
    fit = max(1, workspace // (wide * itemsize + 3 * 4 * segments))
    if fit > block.rows:
        fit = fit // block.rows * block.rows
    return max(1, min(n, fit)), wide


def _exps(
    x: Tensor, tokens: Tokens, head: Head, block: launch.Blocks, exps: Tensor
) -> tuple[RowStats, Tensor, Tensor]:
    """Fills exps (n, V); returns the statistics, the peaks (n, S), and the targets' logits (n)."""
    n, v = len(x), len(head.weight)
    segments = -(-v // (block.cols // block.parts))
    parts = torch.empty(3, n, segments, dtype=torch.float32, device=x.device)
    target_z = torch.full((n,), torch.nan, dtype=torch.float32, device=x.device)
    inner, outer = launch.transform_constants(head.logit_scale, head.softcap, 1.0)
    items = -(-n // block.rows) * -(-v // block.cols)
    with grid.on(x.device):
        _exps_kernel[(launch.programs(x.device, items),)](
            **launch.launch_arguments(block, x, head.weight),
            targets=tokens.targets.contiguous(),
            bias=launch.contiguous(head.bias),
            temperatures=tokens.temperature.contiguous(),
            exps=exps,
            segments=parts,
            target_z=target_z,
            exps_n=exps.stride(0),
            S=segments,
            inner=inner,
            outer=outer,
            SOFTCAP=head.softcap is not None,
            PARTS=block.parts,
        )
    # A few numbers of each row: tiles.merge of all segments at once.
    peaks, totals, weights = parts
    peak = peaks.amax(1)
    d = torch.where(peaks == -torch.inf, 0, peaks - peak.unsqueeze(1))
    scale = d.exp()
    weighted = (scale * (weights + totals * d)).sum(1)
    none = peak.new_empty(0)
    return RowStats(peak, (scale * totals).sum(1), weighted, none, none, none), peaks, target_z


def _fill_holes(active: Tensor, n: int) -> Tensor:
    """For each row of dZ the row of the chunk that it comes from. Active rows stay where they are;
    those beyond the number of active rows fill the holes, so that this can be done in place."""
    k = len(active)
    if k == n:
        return active
    # By ranks, as a selection by a mask would wait for a number.
    stays = torch.zeros(n, dtype=torch.bool, device=active.device).index_fill_(0, active, True)[:k]
    beyond = stays.sum() + (~stays).cumsum(0) - 1  # where in `active`, of a hole
    here = torch.arange(k, device=active.device)
    return torch.where(stays, here, active[beyond.clamp(max=max(k - 1, 0))])


def _dlogits(
    exps: Tensor,
    dtype: torch.dtype,
    peaks: Tensor,  # (n, S)
    source: Tensor,  # (k)
    tokens: Tokens,  # of those rows, as per_row
    per_row: Tensor,  # (6, k)
    head: Head,
    segment: int,
) -> Tensor:
    """dZ (k, V) of the products' dtype, in the memory of exps."""
    dz = exps if exps.dtype == torch.float32 else exps.view(dtype)
    k, v = len(source), exps.shape[1]
    inner, outer = launch.transform_constants(head.logit_scale, head.softcap, 1.0)
    with grid.on(exps.device):
        _dlogits_kernel[(peaks.shape[1], -(-k // DLOGITS_ROWS))](
            exps=exps,
            dz=dz,
            peaks=peaks,
            source=source,
            targets=tokens.targets,
            per_row=per_row.contiguous(),
            temperatures=tokens.temperature.contiguous(),
            n=k,
            V=v,
            S=peaks.shape[1],
            exps_n=exps.stride(0),
            inner=inner,
            outer=outer,
            SOFTCAP=head.softcap is not None,
            ROWS=DLOGITS_ROWS,
            SEGMENT=segment,
            PTX=launch.ptx(exps),
        )
    return dz[:k]


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases(arch: int | str) -> Iterator[dict[str, Any]]:
    """The kernels as `chunked` would launch them on `arch`, in their main variants."""
    variants: list[tuple[str, dict[str, Any]]] = [
        ("bf16", {}),
        ("bf16_softcap_bias", {"softcap": True, "bias": True}),
        ("fp32", {"dtype": "fp32"}),
    ]
    for name, options in variants:
        dtype = options.get("dtype", "bf16")
        block = launch.blocks(arch, 4 if dtype == "fp32" else 2, 1, True)
        exps = {"exps": f"*{dtype}", "exps_n": "i32", "S": "i32", "target_z": "*fp32"}
        yield launch.aot_case(
            _exps_kernel,
            f"exps_kernel_{name}",
            arch,
            {**exps, "segments": "*fp32"},
            temperatures=True,
            **options,
        )
        yield launch.aot_case(
            _dlogits_kernel,
            f"policy_dlogits_kernel_{name}",
            arch,
            {**exps, "peaks": "*fp32", "source": "*i64", "per_row": "*fp32"},
            temperatures=True,
            **{**options, "bias": False},
            constexprs={"ROWS": DLOGITS_ROWS, "SEGMENT": block.cols // block.parts},
        )
