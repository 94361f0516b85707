"""The Triton half of linear_gather_logprobs: one kernel each way beside the products.

Read downward: forward kernel, dZ kernel, the loops over chunks, cases for ahead-of-time
compilation. Importing this module imports triton.
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
from gikernels.vocabulary import launch, logit_rows, tiles
from gikernels.vocabulary.head import Head, spans


@triton.jit(do_not_specialize=["N", "K"])
def _gather_kernel(
    raw,  # (N, V)
    bias,  # (V) or None
    temperatures,  # (N)
    ids,  # (N, K) int64
    logprobs,  # (N, K) out
    stats,  # (2, N) out: peak and total
    N,
    V,
    K,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """One row: its sum, then its given tokens, a few at a time."""
    row = tl.program_id(0).to(tl.int64)
    outer_row = outer / tl.load(temperatures + row)
    raw += row * V
    peak, total = logit_rows.sum_of_row(raw, bias, V, inner, outer_row, SOFTCAP, BLOCK)
    one = row + tl.arange(0, 1)
    tl.store(stats + one, peak)
    tl.store(stats + N + one, total)
    for start in range(0, K, IDS):
        k = start + tl.arange(0, IDS)
        v = tl.load(ids + row * K + k, mask=k < K, other=-1)
        known = (v >= 0) & (v < V)
        z = tl.load(raw + v, mask=known, other=0.0)
        if bias is not None:
            z += tl.load(bias + v, mask=known, other=0.0).to(tl.float32)
        z = tiles.final_logits(z, inner, outer_row, SOFTCAP)
        logprob = z - peak - tl.log(total)
        tl.store(logprobs + row * K + k, tl.where(known, logprob, float("nan")), mask=k < K)


@triton.jit(do_not_specialize=["N", "K", "dz_n"])
def _gather_dlogits_kernel(
    raw,  # (N, V)
    bias,  # (V) or None
    temperatures,  # (N)
    ids,  # (N, K) int64
    exact,  # (N, K): dZ at those tokens
    stats,  # (2, N)
    shares,  # (N): minus the sum of a row's upstream gradients
    dz,  # (N, V) out, rows dz_n apart
    N,
    V,
    K,
    dz_n,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """dZ of a block of one row: probabilities, then what is known exactly over them."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    outer_row = outer / tl.load(temperatures + row)
    cols = start + tl.arange(0, BLOCK)
    z = logit_rows.final(raw + row * V, bias, start, V, inner, outer_row, SOFTCAP, BLOCK)
    # Peak and log(total) one after the other: their sum would round at a large offset.
    log_p = z - tl.load(stats + row) - tl.log(tl.load(stats + N + row))
    grad = tl.load(shares + row) * tl.exp(log_p)
    slope = inner * outer_row
    if SOFTCAP:
        grad *= tiles.logit_slope(z, inner, outer_row, SOFTCAP)
    else:
        grad *= slope
    at = dz + row * dz_n + cols[None, :]
    tl.store(at, grad.to(dz.dtype.element_ty), mask=(cols < V)[None, :])
    tl.debug_barrier()  # those that follow lie over some of them
    for first in range(0, K, IDS):
        k = first + tl.arange(0, IDS)
        v = tl.load(ids + row * K + k, mask=k < K, other=-1)
        here = (v >= start) & (v < start + BLOCK) & (v < V)
        known = tl.load(exact + row * K + k, mask=k < K, other=0.0) * slope
        tl.store(dz + row * dz_n + v, known.to(dz.dtype.element_ty), mask=here)


def _ids_at_once(k: int) -> int:
    return min(256, triton.next_power_of_2(max(k, 1)))


def forward(
    hidden: Tensor,  # (n, D)
    ids: Tensor,  # (n, K)
    temperature: Tensor,  # (n)
    head: Head,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, K), and peak and total of each row (2, n)."""
    (n, k), v, device = ids.shape, len(head.weight), hidden.device
    logprobs = torch.empty(n, k, dtype=torch.float32, device=device)
    stats = torch.empty(2, n, dtype=torch.float32, device=device)
    for rows in spans(n, logit_rows.tall(n, v, workspace_for(device), 4)):
        raw = logit_rows.raw_logits(hidden[rows], head)
        some = torch.empty(2, len(raw), dtype=torch.float32, device=device)
        with grid.on(device):
            _gather_kernel[(len(raw),)](
                raw=raw,
                ids=ids[rows].contiguous(),
                logprobs=logprobs[rows],
                stats=some,
                N=len(raw),
                K=k,
                IDS=_ids_at_once(k),
                **logit_rows.arguments(head, temperature[rows], logit_rows.block_of(v)),
            )
        stats[:, rows] = some
        del raw  # before the next is made
    return logprobs, stats


def backward(
    exact: Tensor,  # (n, K) of gather_logprobs.at_ids
    total_g: Tensor,  # (n)
    stats: Tensor,  # (2, n)
    hidden: Tensor,  # (n, D): as all others, only the rows that have a gradient
    ids: Tensor,  # (n, K)
    temperature: Tensor,  # (n)
    head: Head,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of hidden in fp32, weight and bias."""
    (n, k), v, device = ids.shape, len(head.weight), hidden.device
    block = logit_rows.block_of(v)
    itemsize = 4 + launch.scratch_dtype(hidden).itemsize
    tall = logit_rows.tall(n, v, workspace_for(device), itemsize)
    sums = launch.Gradients(hidden, head.weight, -(-n // tall), wanted)
    scratch = logit_rows.empty_dz(hidden, tall, v)
    for rows in spans(n, tall):
        x = hidden[rows]
        raw, dz = logit_rows.raw_logits(x, head), scratch[: len(x), :v]
        with grid.on(device):
            _gather_dlogits_kernel[(len(x), -(-v // block))](
                raw=raw,
                ids=ids[rows].contiguous(),
                exact=exact[rows].contiguous(),
                stats=stats[:, rows].contiguous(),
                shares=-total_g[rows],
                dz=dz,
                N=len(x),
                K=k,
                dz_n=dz.stride(0),
                IDS=_ids_at_once(k),
                **logit_rows.arguments(head, temperature[rows], block),
            )
        del raw
        sums.add(rows, x, dz)
    return sums.all()


def aot_cases() -> Iterator[dict[str, Any]]:
    for fn in (_gather_kernel, _gather_dlogits_kernel):
        for name, bias in (("plain", False), ("softcap_bias", True)):
            types, constants = logit_rows.aot_types(bias)
            yield grid.aot_case(
                fn,
                f"{fn.__name__}_{name}",
                {**types, "ids": "*i64", "dz_n": "i32"},
                {**constants, "SOFTCAP": bias, "IDS": 64},
                num_warps=8,
            )
