"""Triton device functions on one tile of logits, shared by the kernels over the vocabulary.

Importing this module imports triton; operations do so when a kernel is first launched, so that
`import gikernels` works without it.

A row's statistics are kept relative to its running maximum, `peak`, which starts at -inf, so that
neither an offset of 1e4 nor logits that are all at -110 cost precision (u = z - peak):

    total    = sum exp(u)                 log-sum-exp = peak + log(total)
    weighted = sum exp(u) u               entropy     = log(total) - weighted / total
    cross    = sum exp(u) (u - ref_u)     KL          = cross / total - log(total) + log(ref_total)

Tiles are (ROWS, COLS) fp32; a column beyond the vocabulary holds -inf, as does a token whose bias
is -inf: both add nothing.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from gikernels.backends import dispatch

# The interpreter's bf16 dot and bf16 addition return garbage: kernels widen their inputs there.
INTERPRETED = tl.constexpr(dispatch.interpreting())
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x, with 0 for results below 2^-126, which cost three more instructions otherwise and are
    nothing beside a row's total of at least 1. PTX: on a GPU by NVIDIA."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def exp(x, PTX: tl.constexpr):
    if PTX:
        return exp2(x * LOG2_E, PTX)
    else:
        return tl.exp(x)


@triton.jit
def tanh(x):
    """To fp32 rounding; tanh.approx.f32 is off by 5e-4, and 1 - 2 / (e + 1) cancels near zero."""
    square = x * x
    # The next term of the series is below 1e-8 of the result where |x| < 0.25.
    series = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    size = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -size, size))


@triton.jit
def final_logits(raw, inner, outer, SOFTCAP: tl.constexpr):
    """reference.transform_logits: raw * inner * outer, or outer * tanh(raw * inner).

    `inner` is a number; `outer` is a number or (ROWS, 1), from launch.transform_constants.
    """
    if SOFTCAP:
        return tanh(raw * inner) * outer
    else:
        return raw * (inner * outer)


@triton.jit
def logit_slope(z, inner, outer, SOFTCAP: tl.constexpr):
    """d final_logits / d raw, from the final logits z themselves."""
    if SOFTCAP:
        capped = z / outer
        return (1 - capped * capped) * (inner * outer)
    else:
        return tl.zeros_like(z) + inner * outer


@triton.jit
def shift(old_peak, new_peak):
    """The change of the old sums' exponents; 0 where there was nothing yet (-inf - -inf is NaN)."""
    return tl.where(old_peak == float("-inf"), 0.0, old_peak - new_peak)


@triton.jit
def below_peak(z, peak):
    """z - peak, with -inf and not NaN where everything so far was -inf."""
    return z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]


@triton.jit
def merge(peak, total, weighted, other_peak, other_total, other_weighted, PTX: tl.constexpr):
    """The statistics of two sets of columns together; each argument (ROWS)."""
    new_peak = tl.maximum(peak, other_peak)
    d, e = shift(peak, new_peak), shift(other_peak, new_peak)
    scale, other_scale = exp(d, PTX), exp(e, PTX)
    weighted = scale * (weighted + total * d)
    other_weighted = other_scale * (other_weighted + other_total * e)
    return new_peak, scale * total + other_scale * other_total, weighted + other_weighted


@triton.jit
def merge_ref(
    peak, total, ref_peak, ref_total, cross,
    other_peak, other_total, other_ref_peak, other_ref_total, other_cross, PTX: tl.constexpr,
):  # fmt: skip
    """The reference's share of `merge`: new (ref_peak, ref_total, cross); needs the OLD peaks."""
    new_peak, new_ref = tl.maximum(peak, other_peak), tl.maximum(ref_peak, other_ref_peak)
    d, e = shift(peak, new_peak), shift(other_peak, new_peak)
    ref_d, ref_e = shift(ref_peak, new_ref), shift(other_ref_peak, new_ref)
    cross = exp(d, PTX) * (cross + total * (d - ref_d))
    other_cross = exp(e, PTX) * (other_cross + other_total * (e - ref_e))
    new_total = exp(ref_d, PTX) * ref_total + exp(ref_e, PTX) * other_ref_total
    return new_ref, new_total, cross + other_cross


@triton.jit
def tile_stats(z, PTX: tl.constexpr):
    """(peak, total, weighted) of one tile z (ROWS, COLS), each (ROWS)."""
    peak = tl.max(z, 1)
    u = below_peak(z, peak)
    e = exp(u, PTX)
    # Where u is -inf, e is 0 and 0 * -inf would be NaN. A NaN in u stays NaN through e.
    return peak, tl.sum(e, 1), tl.sum(e * tl.maximum(u, -1e30), 1)


@triton.jit
def tile_stats_ref(z, peak, ref_z, PTX: tl.constexpr):
    """(ref_peak, ref_total, cross) of one tile of both, each (ROWS); `peak` is z's."""
    ref_peak = tl.max(ref_z, 1)
    u, ref_u = below_peak(z, peak), below_peak(ref_z, ref_peak)
    e = exp(u, PTX)
    # A token that cannot be drawn adds nothing, whatever the reference thinks of it.
    cross = tl.sum(tl.where(e > 0, e * (u - ref_u), 0.0), 1)
    return ref_peak, tl.sum(exp(ref_u, PTX), 1), cross


@triton.jit
def entropy_of(total, weighted):
    return tl.log(total) - weighted / total


@triton.jit
def kl_of(total, ref_total, cross):
    return cross / total - tl.log(total) + tl.log(ref_total)


@triton.jit
def dlogits(log_p, is_target, g_logprob, g_entropy, entropy, PTX: tl.constexpr):
    """d / dz of g_logprob * log p[target] + g_entropy * entropy; g_* and entropy are (ROWS, 1).

    d log p[t] / dz_v = 1[v = t] - p_v            d entropy / dz_v = -p_v (log p_v + entropy)
    """
    slope = -g_logprob - g_entropy * (tl.maximum(log_p, -1e30) + entropy)
    return exp(log_p, PTX) * slope + tl.where(is_target, g_logprob, 0.0)


@triton.jit
def dlogits_kl(log_p, log_q, g_kl, kl, PTX: tl.constexpr):
    """d / dz of g_kl * KL(p || q), to be added: dKL / dz_v = p_v (log p_v - log q_v - KL)."""
    p = exp(log_p, PTX)
    return tl.where(p > 0, p * g_kl * (log_p - log_q - kl), 0.0)


@triton.jit
def product_tile(
    x,  # (N, D): a pointer, or a descriptor of (ROWS, DEPTH) blocks where TMA
    w,  # (V, D): a pointer, or a descriptor of (COLS, DEPTH) blocks where TMA
    row,
    col,
    N,
    V,
    D,
    x_stride_n,
    x_stride_d,
    w_stride_v,
    w_stride_d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[row : row + ROWS] @ w[col : col + COLS].T in fp32; rows and columns beyond are arbitrary.

    64-bit offsets: V * D passes 2^31 at 151936 x 16384.
    """
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if TMA:
        for k in range(0, D, DEPTH):
            a = x.load([row, k])
            b = w.load([col, k])
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        # Clamped and not masked: the last row is loaded again, and nobody reads what it gives.
        rows = tl.minimum(row + tl.arange(0, ROWS), N - 1).to(tl.int64)
        cols = tl.minimum(col + tl.arange(0, COLS), V - 1).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        a_ptr = x + rows[:, None] * x_stride_n + depth[None, :] * x_stride_d
        b_ptr = w + cols[None, :] * w_stride_v + depth[:, None] * w_stride_d
        for k in range(0, D, DEPTH):
            inside = depth < D - k
            a = tl.load(a_ptr, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptr, mask=inside[:, None], other=0.0)
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptr += DEPTH * x_stride_d
            b_ptr += DEPTH * w_stride_d
    return acc


@triton.jit
def narrow(target, V):
    """Targets in 32 bits, -1 where they are no token: every logit of a tile is compared with one of
    them, which in 64 bits was a third of the epilogue's instructions."""
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def row_outer(temperatures, rows, N, outer):
    """`outer` of final_logits: a number, or (ROWS, 1) where each row has a temperature."""
    if temperatures is not None:
        t = tl.load(temperatures + rows, mask=rows < N, other=1.0).to(tl.float32)
        return (outer / t)[:, None]
    else:
        return outer


@triton.jit
def final_of_raw(raw, bias, cols, V, inner, outer, SOFTCAP: tl.constexpr):
    """Final logits of a tile of products."""
    if bias is not None:
        raw += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return final_logits(raw, inner, outer, SOFTCAP)


@triton.jit
def inside(z, col, V):
    """-inf beyond the vocabulary, where only its last tile reaches."""
    if col + z.shape[1] > V:
        z = tl.where((col + tl.arange(0, z.shape[1]) < V)[None, :], z, float("-inf"))
    return z


@triton.jit
def store_target(z, col, rows, target, target_z):
    """A row's own logit, by the one tile that has it: of 128 rows a tile of 256 columns has some in
    one case of five, and else compares nothing but their numbers."""
    own = target - col
    has = (own >= 0) & (own < z.shape[1])
    if tl.max(has.to(tl.int32), 0) > 0:
        is_target = tl.arange(0, z.shape[1])[None, :] == own[:, None]
        tl.store(target_z + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=has)


@triton.jit
def grouped(item, row_blocks, col_blocks, GROUP: tl.constexpr):
    """(row block, column block): the rows of a group first, so that the programs that run at one
    time read few rows of hidden and few of weight, and share them in the second-level cache."""
    group = item // (GROUP * col_blocks)
    tall = tl.minimum(GROUP, row_blocks - group * GROUP)
    within = item % (GROUP * col_blocks)
    return group * GROUP + within % tall, within // tall


@triton.jit
def halves(tile):
    """The left and the right half of a tile (ROWS, COLS), for an epilogue with fewer registers."""
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
