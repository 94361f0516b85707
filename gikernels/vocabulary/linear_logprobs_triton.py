"""The Triton half of linear_logprobs: one kernel forward, one kernel and two products backward.

Imported when the first kernel is launched. Read downward: forward, backward, cases for
ahead-of-time compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gikernels.backends import grid
from gikernels.backends.settings import workspace_for
from gikernels.vocabulary import launch
from gikernels.vocabulary.head import RowStats, spans
from gikernels.vocabulary.linear_logprobs_kernels import dlogits_kernel, forward_kernel

# --- forward ------------------------------------------------------------------------------------


def _splits(row_blocks: int, col_tiles: int, workers: int) -> int:
    """Into how many parts the vocabulary is cut, so that the last round of work is a full one.

    The longest program takes ceil(items / workers) items of ceil(col_tiles / splits) tiles; one
    more tile's time an item is for starting and merging. 8192 rows of a vocabulary of 128256 on 132
    multiprocessors: 72 parts, 245 tiles where 243 would be perfect.
    """

    def cost(splits: int) -> float:
        rounds = -(-row_blocks * splits // workers)
        return rounds * (-(-col_tiles // splits) + 0.1)

    return min(range(1, min(col_tiles, max(64, workers)) + 1), key=cost)


# Counters that a kernel leaves at zero, so that the forward is one launch and no fill before it.
# One set for each stream: two streams may be in the same row block at one time.
_counters: dict[tuple[int | None, int], Tensor] = {}


def _arrivals(device: torch.device, row_blocks: int) -> Tensor:
    # A graph's replays may overlap with the stream that captured it; in the interpreter a kernel
    # may be interrupted half-way. Both get their own, filled each time.
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(row_blocks, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or len(_counters[key]) < row_blocks:
        _counters[key] = torch.zeros(max(1024, row_blocks), dtype=torch.int32, device=device)
    return _counters[key]


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ignore_index: int,
    logprobs: Tensor,
    entropy: Tensor,
    kl: Tensor,
    stats: Tensor,
) -> None:
    """Fills the last four in one launch."""
    n, v, device = len(hidden), len(weight), hidden.device
    if n == 0:
        return
    targets = targets.contiguous()
    bias, temperatures = launch.contiguous(bias), launch.contiguous(temperatures)
    block = launch.blocks_for(hidden, weight, ref_hidden, ref_weight)
    row_blocks, col_tiles = -(-n // block.rows), -(-v // block.cols)
    splits = _splits(row_blocks, col_tiles, launch.programs(device, 1 << 30))
    kept = 4 if ref_hidden is None else 7
    inner, outer = launch.transform_constants(logit_scale, softcap, temperature)
    with grid.on(device):
        forward_kernel[(launch.programs(device, row_blocks * splits),)](
            **launch.launch_arguments(block, hidden, weight, ref_hidden, ref_weight),
            targets=targets,
            bias=bias,
            temperatures=temperatures,
            partials=torch.empty(splits, kept, n, dtype=torch.float32, device=device),
            arrivals=_arrivals(device, row_blocks),
            logprobs=logprobs,
            entropy=entropy,
            kl=kl,
            stats=stats,
            splits=splits,
            inner=inner,
            outer=outer,
            ignore_index=ignore_index,
            SOFTCAP=softcap is not None,
        )


# --- backward -----------------------------------------------------------------------------------


def _per_row(
    stats: RowStats,
    logprob: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
) -> Tensor:
    """What the dZ kernel needs to know of each row: (6, n), with a gradient of the KL (10, n)."""
    none = torch.zeros_like(g_logprob)
    rows = [
        stats.peak,
        stats.total.log(),
        g_logprob,
        none if g_entropy is None else g_entropy,
        stats.entropy,
        logprob,
    ]
    if g_kl is not None:
        rows += [stats.ref_peak, stats.ref_total.log(), g_kl, stats.kl]
    return torch.stack(rows)


def _slab_shape(n: int, v: int, size: int) -> tuple[int, int]:
    """Rows and columns of dZ within `size` elements: all rows if it can be, then columns.

    With all rows a slab of dW is one product, and dX is read and written once for each slab: at
    8192 x 128256 x 4096 and 256 MiB that is 8 times 0.27 GB. Columns come in 256, which is what the
    products like.
    """
    tall = min(n, max(1, size // 256))
    return tall, min(-(-v // 256) * 256, max(256, size // tall // 256 * 256))


def backward(
    hidden: Tensor,  # (n, D): as all that follows, only the rows that have a gradient
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,  # None where the KL has no gradient
    ref_weight: Tensor | None,
    stats: RowStats,
    logprob: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    dx: Tensor | None,  # (n, D) fp32 zeros
    dw: Tensor | None,  # (V, D)
    db: Tensor | None,  # (V)
) -> None:
    """Fills dx, dw and db where they are wanted: for each slab of the vocabulary one kernel for dZ,
    dX += dZ @ weight[slab] and dW[slab] = dZ.T @ hidden."""
    n, v, device = len(hidden), len(weight), hidden.device
    targets = targets.contiguous()
    bias, temperatures = launch.contiguous(bias), launch.contiguous(temperatures)
    per_row = _per_row(stats, logprob, g_logprob, g_entropy, g_kl)
    block = launch.blocks_for(hidden, weight, ref_hidden, ref_weight)
    dz_dtype = launch.scratch_dtype(hidden)
    tall, wide = _slab_shape(n, v, workspace_for(device) // dz_dtype.itemsize)
    scratch = torch.empty(tall, wide, dtype=dz_dtype, device=device)
    inner, outer = launch.transform_constants(logit_scale, softcap, temperature)
    for cols in spans(v, wide):
        slab_dw = slab_db = None
        if dw is not None and tall < n:
            slab_dw = dw.new_zeros(cols.stop - cols.start, dw.shape[1], dtype=torch.float32)
        if db is not None:
            slab_db = db.new_zeros(cols.stop - cols.start, dtype=torch.float32)
        for rows in spans(n, tall):
            x = hidden[rows]
            dz = scratch[: len(x), : cols.stop - cols.start]
            row_blocks, col_tiles = -(-len(x) // block.rows), -(-dz.shape[1] // block.cols)
            ref_x = None if ref_hidden is None else ref_hidden[rows]
            with grid.on(device):
                dlogits_kernel[(launch.programs(device, row_blocks * col_tiles),)](
                    **launch.launch_arguments(block, x, weight, ref_x, ref_weight),
                    targets=targets[rows],
                    bias=bias,
                    temperatures=None if temperatures is None else temperatures[rows],
                    per_row=per_row[:, rows].contiguous(),
                    dz=dz,
                    dz_n=dz.stride(0),
                    col_start=cols.start,
                    col_end=cols.stop,
                    inner=inner,
                    outer=outer,
                    SOFTCAP=softcap is not None,
                    PARTS=block.parts,
                )
            if dx is not None:
                launch.add_product(dx[rows], dz, weight[cols])
            if slab_dw is not None:
                launch.add_product(slab_dw, dz.T, x)
            elif dw is not None:
                launch.write_product(dw[cols], dz.T, x)
            if slab_db is not None:
                slab_db += dz.sum(0, dtype=torch.float32)
        if dw is not None and slab_dw is not None:
            dw[cols] = slab_dw
        if db is not None and slab_db is not None:
            db[cols] = slab_db


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases(arch: int | str) -> Iterator[dict[str, Any]]:
    """The kernels as `forward` and `backward` would launch them on `arch`, in their main variants:
    bf16 with and without a reference, softcap and per-row temperature, unaligned, and fp32."""
    variants: list[tuple[str, dict[str, Any]]] = [
        ("bf16", {}),
        ("bf16_ref", {"ref": True}),
        ("bf16_softcap_bias", {"softcap": True, "bias": True, "temperatures": True}),
        ("bf16_unaligned", {"aligned": False}),
        ("fp32", {"dtype": "fp32"}),
    ]
    outputs = {
        forward_kernel: {
            "partials": "*fp32",
            "arrivals": "*i32",
            "logprobs": "*fp32",
            "entropy": "*fp32",
            "kl": "*fp32",
            "stats": "*fp32",
            "splits": "i32",
            "ignore_index": "i32",
        },
        dlogits_kernel: {"per_row": "*fp32", "dz_n": "i32", "col_start": "i32", "col_end": "i32"},
    }
    for fn, others in outputs.items():
        for name, options in variants:
            yield launch.aot_case(fn, f"{fn.__name__}_{name}", arch, others, **options)
