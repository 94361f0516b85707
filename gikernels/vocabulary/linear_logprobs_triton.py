"""The Triton half of linear_logprobs: two kernels forward, one kernel and two products backward.

Imported when the first kernel is launched. Read downward: forward, backward, cases for
ahead-of-time compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gikernels.backends import grid
from gikernels.backends.settings import workspace_for
from gikernels.vocabulary import launch
from gikernels.vocabulary.head import RowStats, spans
from gikernels.vocabulary.linear_logprobs_kernels import (
    dlogits_kernel,
    forward_kernel,
    merge_kernel,
)

# --- forward ------------------------------------------------------------------------------------


MERGED_ROWS, MERGED_TILES = 32, 16
"""Of a program that merges; coalesced reads of 128 bytes."""


def _stat_parts(arch: int | str, softcap: bool) -> int:
    """In how many parts a tile's statistics are taken, so that nothing spills: a tanh of all of it
    would, and on Blackwell, whose products leave fewer registers free, every epilogue does."""
    return 2 if softcap or (isinstance(arch, int) and 100 <= arch < 120) else 1


def _active_blocks(targets: Tensor, ignore_index: int, rows: int) -> tuple[Tensor, Tensor]:
    """(row blocks) int32, those with a row that is not ignored first and in order; and (1) how many
    they are. By the device alone: prompts and padding often fill whole blocks, and programs that
    took blocks in turns would have unequal shares of the others."""
    blocks = -(-len(targets) // rows)
    if blocks == 1:
        one = torch.ones(1, dtype=torch.int32, device=targets.device)
        return one - 1, one
    kept = (targets != ignore_index).to(torch.int8)
    some = F.pad(kept, (0, blocks * rows - len(kept))).view(blocks, rows).amax(1)
    order = some.argsort(descending=True, stable=True)
    return order.int(), some.sum(dtype=torch.int32).view(1)


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
    logprobs: Tensor,  # (N), like those that follow fp32
    entropy: Tensor,  # (N)
    kl: Tensor,  # (N), or empty
    stats: Tensor,  # (3, N) or (6, N)
) -> None:
    """Fills the last four: statistics of every tile of logits, a few numbers a row, then their
    merge. 8192 rows of a vocabulary of 128256 have 501 tiles of 256, 49 MB of such numbers; as many
    rows at a time as keep them within the workspace."""
    n, v, device = len(hidden), len(weight), hidden.device
    targets = targets.contiguous()
    bias, temperatures = launch.contiguous(bias), launch.contiguous(temperatures)
    block = launch.blocks_for(hidden, weight, ref_hidden, ref_weight)
    col_tiles, keep = -(-v // block.cols), 3 if ref_hidden is None else 6
    wide = launch.GROUP * block.rows
    most = max(1, workspace_for(device) // (4 * keep * col_tiles) // wide) * wide
    inner, outer = launch.transform_constants(logit_scale, softcap, temperature)
    for rows in spans(n, most):
        x, target = hidden[rows], targets[rows]
        ref_x = None if ref_hidden is None else ref_hidden[rows]
        blocks, count = _active_blocks(target, ignore_index, block.rows)
        partials = torch.empty(col_tiles, keep, len(x), dtype=torch.float32, device=device)
        # A target outside the vocabulary is never met: NaN, not a plausible number.
        target_z = torch.full((len(x),), torch.nan, dtype=torch.float32, device=device)
        with grid.on(device):
            forward_kernel[(launch.programs(device, len(blocks) * col_tiles),)](
                **launch.launch_arguments(block, x, weight, ref_x, ref_weight),
                targets=target,
                bias=bias,
                temperatures=None if temperatures is None else temperatures[rows],
                blocks=blocks,
                count=count,
                partials=partials,
                target_z=target_z,
                inner=inner,
                outer=outer,
                SOFTCAP=softcap is not None,
                STAT_PARTS=_stat_parts(launch.arch_of(device), softcap is not None),
            )
            merge_kernel[(-(-len(x) // MERGED_ROWS),)](
                partials=partials,
                target_z=target_z,
                targets=target,
                logprobs=logprobs[rows],
                entropy=entropy[rows],
                kl=kl if ref_x is None else kl[rows],
                stats=stats[:, rows],
                N=len(x),
                col_tiles=col_tiles,
                stats_n=stats.stride(0),
                ignore_index=ignore_index,
                HAS_REF=ref_x is not None,
                ROWS=MERGED_ROWS,
                TILES=MERGED_TILES,
                PTX=launch.ptx(x),
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
            "blocks": "*i32",
            "count": "*i32",
            "partials": "*fp32",
            "target_z": "*fp32",
        },
        dlogits_kernel: {"per_row": "*fp32", "dz_n": "i32", "col_start": "i32", "col_end": "i32"},
    }
    for fn, others in outputs.items():
        for name, options in variants:
            parts = {"STAT_PARTS": _stat_parts(arch, options.get("softcap", False))}
            yield launch.aot_case(
                fn, f"{fn.__name__}_{name}", arch, others, constexprs=parts, **options
            )
    merged = dict.fromkeys(("partials", "target_z", "logprobs", "entropy", "kl", "stats"), "*fp32")
    sizes = dict.fromkeys(("N", "col_tiles", "stats_n", "ignore_index"), "i32")
    for has_ref in (False, True):
        yield grid.aot_case(
            merge_kernel,
            f"merge_kernel{'_ref' if has_ref else ''}",
            {**merged, "targets": "*i64", **sizes},
            {
                "HAS_REF": has_ref,
                "ROWS": MERGED_ROWS,
                "TILES": MERGED_TILES,
                "PTX": isinstance(arch, int),
            },
        )
