"""The Triton kernels of `logprobs`. The mathematics is in logprobs.py.

Read downward: running sums, forward, the merge of a shared row, backward. Importing this module
imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gikernels.vocabulary import tiles

# The kernels keep to "raw" logits x: the given ones, or tanh(inner * x) where there is a softcap.
# Final logits are factor * x with factor > 0, so that sums of exp(factor * u) u, where u = x - peak
# is exact, wait for the factor until they are complete, and the maximum does not need it at all.
# With exp(factor * u) as 2^(rate * u) that is 10 instructions a logit. Natural exponentials of
# final logits took 15; at 16 an H200, which reads 8 bf16 logits a clock on each of its processors
# and issues 128 instructions, would no longer wait for memory.


@triton.jit
def _raw(x, inner, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    if SOFTCAP:
        x = tiles.tanh(x * inner)
    return -x if NEGATIVE else x


@triton.jit
def _below(x, peak):
    """x - peak <= 0. Finite for -inf, also where the peak is -inf; NaN for NaN."""
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return tl.maximum(x - peak, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _absorb(sums, x, ref_x, rate, HAS_REF: tl.constexpr, PTX: tl.constexpr):
    """A tile of raw logits (LANES, VEC) into the running sums (LANES)."""
    peak, total, weighted, ref_peak, ref_total, cross = sums
    new_peak = tl.maximum(peak, tl.max(x, 1))
    d = _below(peak, new_peak)  # of the old sums, which are 0 where the peak was -inf
    u = _below(x, new_peak[:, None])
    scale, e = tiles.exp2(rate * d, PTX), tiles.exp2(rate * u, PTX)
    if HAS_REF:
        new_ref_peak = tl.maximum(ref_peak, tl.max(ref_x, 1))
        ref_d = _below(ref_peak, new_ref_peak)
        ref_u = _below(ref_x, new_ref_peak[:, None])
        cross = scale * (cross + total * (d - ref_d)) + tl.sum(e * (u - ref_u), 1)
        ref_e = tiles.exp2(rate * ref_u, PTX)
        ref_total = tiles.exp2(rate * ref_d, PTX) * ref_total + tl.sum(ref_e, 1)
        ref_peak = new_ref_peak
    weighted = scale * (weighted + total * d) + tl.sum(e * u, 1)
    total = scale * total + tl.sum(e, 1)
    return new_peak, total, weighted, ref_peak, ref_total, cross


@triton.jit
def _across_lanes(sums, rate, HAS_REF: tl.constexpr):
    """The sums (LANES) as those of the whole, scalars."""
    peak, total, weighted, ref_peak, ref_total, cross = sums
    top = tl.max(peak, 0)
    d = _below(peak, top)
    scale = tl.exp2(rate * d)
    ref_top, ref_sum, cross_sum = top, top, top  # where there is no reference nobody reads them
    if HAS_REF:
        ref_top = tl.max(ref_peak, 0)
        ref_d = _below(ref_peak, ref_top)
        ref_sum = tl.sum(tl.exp2(rate * ref_d) * ref_total, 0)
        cross_sum = tl.sum(scale * (cross + total * (d - ref_d)), 0)
    weighted = tl.sum(scale * (weighted + total * d), 0)
    return top, tl.sum(scale * total, 0), weighted, ref_top, ref_sum, cross_sum


@triton.jit
def _row_start(row, width, stride_a, stride_b):
    """Where row (a, b) of A x width rows begins. 64 bits: rows x vocabulary passes 2^31."""
    return (row // width).to(tl.int64) * stride_a + (row % width).to(tl.int64) * stride_b


@triton.jit
def _store_row(
    row, sums, target, logits, stride_v, vocab, inner, factor, logprobs, entropy, kl, norms,
    HAS_REF: tl.constexpr, SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """The results of one row, whose logits begin at `logits`."""
    peak, total, weighted, ref_peak, ref_total, cross = sums
    inside = (target >= 0) & (target < vocab)  # else NaN: nobody looked at the targets on a GPU
    x = tl.load(logits + target * stride_v, mask=inside, other=float("nan")).to(peak.dtype)
    log_total = tl.log(total)
    u = (_raw(x, inner, SOFTCAP, NEGATIVE) - peak) * factor
    tl.store(logprobs + row, u - log_total)
    tl.store(entropy + row, log_total - factor * (weighted / total))
    if HAS_REF:
        mean = factor * (cross / total)
        tl.store(kl + row, mean - log_total + tl.log(ref_total))
        norms += row * 4
        tl.store(norms + 2, ref_peak)
        tl.store(norms + 3, mean)
    else:
        norms += row * 2
    tl.store(norms, peak)
    tl.store(norms + 1, log_total)


@triton.jit(do_not_specialize=["width", "splits", "ignore_index", "ref_width"])
def forward_kernel(
    logits,  # (A, width, vocab)
    targets,  # (N)
    temperatures,  # (N)
    logprobs,  # (N)
    entropy,  # (N)
    kl,  # (N)
    norms,  # (N, 2) or (N, 4)
    partial,  # (N, splits, 8), where several programs share a row
    vocab,
    width,
    stride_a,
    stride_b,
    stride_v,
    inner: tl.float64,
    factor: tl.float64,
    ignore_index,
    splits,
    span,  # columns of a program, a multiple of LANES * VEC
    ref_logits,  # (A', ref_width, vocab)
    ref_width,
    ref_stride_a,
    ref_stride_b,
    ref_stride_v,
    HAS_REF: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SHARED: tl.constexpr,
    PTX: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Program (row, split) reads columns [split * span, (split + 1) * span) of one row, once."""
    stat = norms.dtype.element_ty
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    target = tl.load(targets + row)
    inner, factor = tl.full((), inner, stat), tl.full((), factor, stat)
    if target != ignore_index:
        if HAS_TEMPERATURES:
            factor = factor / tl.load(temperatures + row).to(stat)
        logits += _row_start(row, width, stride_a, stride_b)
        ref_logits += _row_start(row, ref_width, ref_stride_a, ref_stride_b)
        nothing, zeros = tl.full((LANES,), float("-inf"), stat), tl.zeros((LANES,), stat)
        sums = (nothing, zeros, zeros, nothing, zeros, zeros)
        tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        first = split * span
        last = tl.minimum(first + span, vocab)
        # Whole tiles need no mask; the tail, where there is one, comes after.
        whole = first + (last - first) // (LANES * VEC) * (LANES * VEC)
        for start in range(first, whole, LANES * VEC):
            columns = (start + tile).to(tl.int64)
            x = _raw(tl.load(logits + columns * stride_v).to(stat), inner, SOFTCAP, NEGATIVE)
            ref_x = x
            if HAS_REF:
                ref_x = tl.load(ref_logits + columns * ref_stride_v).to(stat)
                ref_x = _raw(ref_x, inner, SOFTCAP, NEGATIVE)
            sums = _absorb(sums, x, ref_x, factor * tiles.LOG2_E, HAS_REF, PTX)
        if whole < last:
            columns = (whole + tile).to(tl.int64)
            inside = columns < last
            x = tl.load(logits + columns * stride_v, mask=inside, other=0).to(stat)
            x = tl.where(inside, _raw(x, inner, SOFTCAP, NEGATIVE), float("-inf"))
            ref_x = x
            if HAS_REF:
                ref_x = tl.load(ref_logits + columns * ref_stride_v, mask=inside, other=0).to(stat)
                ref_x = tl.where(inside, _raw(ref_x, inner, SOFTCAP, NEGATIVE), float("-inf"))
            sums = _absorb(sums, x, ref_x, factor * tiles.LOG2_E, HAS_REF, PTX)
        sums = _across_lanes(sums, factor * tiles.LOG2_E, HAS_REF)
        if SHARED:
            mine = partial + (row * splits + split) * 8
            for i in tl.static_range(6):
                tl.store(mine + i, sums[i])
        else:
            _store_row(
                row, sums, target, logits, stride_v, vocab, inner, factor,
                logprobs, entropy, kl, norms, HAS_REF, SOFTCAP, NEGATIVE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["width", "splits", "ignore_index"])
def merge_kernel(
    logits,
    targets,
    temperatures,
    logprobs,
    entropy,
    kl,
    norms,
    partial,  # (N, splits, 8)
    vocab,
    width,
    stride_a,
    stride_b,
    stride_v,
    inner: tl.float64,
    factor: tl.float64,
    ignore_index,
    splits,
    HAS_REF: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SPLITS: tl.constexpr,  # the next power of 2
):
    """Merges what several programs found of one row, in a fixed order: two runs are bit-equal."""
    stat = norms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    inner, factor = tl.full((), inner, stat), tl.full((), factor, stat)
    if target != ignore_index:
        if HAS_TEMPERATURES:
            factor = factor / tl.load(temperatures + row).to(stat)
        logits += _row_start(row, width, stride_a, stride_b)
        split = tl.arange(0, SPLITS)
        there = split < splits
        mine = partial + (row * splits + split) * 8
        peak = tl.load(mine, mask=there, other=float("-inf"))
        total = tl.load(mine + 1, mask=there, other=0)
        weighted = tl.load(mine + 2, mask=there, other=0)
        ref_peak = tl.load(mine + 3, mask=there, other=float("-inf"))
        ref_total = tl.load(mine + 4, mask=there, other=0)
        cross = tl.load(mine + 5, mask=there, other=0)
        sums = (peak, total, weighted, ref_peak, ref_total, cross)
        sums = _across_lanes(sums, factor * tiles.LOG2_E, HAS_REF)
        _store_row(
            row, sums, target, logits, stride_v, vocab, inner, factor,
            logprobs, entropy, kl, norms, HAS_REF, SOFTCAP, NEGATIVE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["width", "ignore_index", "ref_width"])
def backward_kernel(
    dlogits,  # (N, vocab) contiguous
    grad_logprobs,  # (N)
    grad_entropy,  # (N)
    grad_kl,  # (N)
    logits,  # (A, width, vocab)
    targets,  # (N)
    temperatures,  # (N)
    entropy,  # (N)
    norms,  # (N, 2) or (N, 4)
    vocab,
    width,
    stride_a,
    stride_b,
    stride_v,
    inner: tl.float64,
    factor: tl.float64,
    ignore_index,
    ref_logits,  # (A', ref_width, vocab)
    ref_width,
    ref_stride_a,
    ref_stride_b,
    ref_stride_v,
    HAS_REF: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block): one read and one write; a row without a gradient is only written."""
    stat = norms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = columns < vocab
    target = tl.load(targets + row)
    dlogits += row * vocab + columns
    g = tl.load(grad_logprobs + row)
    h = tl.load(grad_entropy + row)
    k = g - g
    if HAS_REF:
        k = tl.load(grad_kl + row)
    inner, factor = tl.full((), inner, stat), tl.full((), factor, stat)
    if (target != ignore_index) & ((g != 0) | (h != 0) | (k != 0)):
        if HAS_TEMPERATURES:
            factor = factor / tl.load(temperatures + row).to(stat)
        norms += row * (4 if HAS_REF else 2)
        logits += _row_start(row, width, stride_a, stride_b)
        x = tl.load(logits + columns * stride_v, mask=inside, other=0).to(stat)
        x = _raw(x, inner, SOFTCAP, NEGATIVE)
        u = (x - tl.load(norms)) * factor
        log_p = u - tl.load(norms + 1)
        dz = tiles.dlogits(log_p, columns == target, g, h, tl.load(entropy + row), False)
        if HAS_REF:
            ref_logits += _row_start(row, ref_width, ref_stride_a, ref_stride_b)
            ref_x = tl.load(ref_logits + columns * ref_stride_v, mask=inside, other=0).to(stat)
            ref_u = (_raw(ref_x, inner, SOFTCAP, NEGATIVE) - tl.load(norms + 2)) * factor
            p = tl.exp(log_p)
            dz += tl.where(p > 0, k * p * (u - ref_u - tl.load(norms + 3)), 0.0)
        if SOFTCAP:
            dz *= (1 - x * x) * inner
        dz *= -factor if NEGATIVE else factor
        tl.store(dlogits, dz.to(dlogits.dtype.element_ty), mask=inside)
    else:
        tl.store(dlogits, tl.zeros((BLOCK,), dlogits.dtype.element_ty), mask=inside)
