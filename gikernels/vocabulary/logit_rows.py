"""Triton on rows of raw logits in fp32, which PyTorch has multiplied: what two operations share.

A chunk of rows (n, V) fits into the workspace. Products are the library's own, which on Hopper and
Blackwell are the fastest there are; what is read and written beside them is 8 bytes a logit and
pass, a tenth of a product's time at D 4096.

Importing this module imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import dispatch
from gikernels.vocabulary import launch, tiles
from gikernels.vocabulary.head import Head


@triton.jit
def final(raw, bias, start, V, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Final logits (1, BLOCK) of a row from column `start` on; -inf beyond the vocabulary."""
    cols = start + tl.arange(0, BLOCK)
    z = tl.load(raw + cols, mask=cols < V, other=0.0)[None, :]
    z = tiles.final_of_raw(z, bias, cols, V, inner, outer, SOFTCAP)
    return tl.where((cols < V)[None, :], z, float("-inf"))


@triton.jit
def sum_of_row(raw, bias, V, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Peak and total of a row, (1) each."""
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, V, BLOCK):
        z = final(raw, bias, start, V, inner, outer, SOFTCAP, BLOCK)
        new_peak = tl.maximum(peak, tl.max(z, 1))
        scale = tl.exp(tiles.shift(peak, new_peak))
        total = scale * total + tl.sum(tl.exp(tiles.below_peak(z, new_peak)), 1)
        peak = new_peak
    return peak, total


def block_of(vocab: int) -> int:
    """Columns at a time; the interpreter's time is that of the number of blocks."""
    return min(1 << 16 if dispatch.interpreting() else 4096, triton.next_power_of_2(vocab))


def tall(n: int, vocab: int, size: int, itemsize: int) -> int:
    """Rows of a chunk whose logits of `itemsize` bytes fit into `size` bytes."""
    return max(1, min(n, size // (vocab * itemsize)))


def arguments(head: Head, temperature: Tensor, block: int) -> dict[str, Any]:
    inner, outer = launch.transform_constants(head.logit_scale, head.softcap, 1.0)
    return {
        "bias": launch.contiguous(head.bias),
        "temperatures": temperature.contiguous(),
        "V": len(head.weight),
        "inner": inner,
        "outer": outer,
        "SOFTCAP": head.softcap is not None,
        "BLOCK": block,
        "num_warps": 8,
    }


def raw_logits(x: Tensor, head: Head) -> Tensor:
    """(n, V) fp32, as contiguous rows."""
    return launch.new_product(x, head.weight.T).contiguous()


def aot_types(bias: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants that the kernels over rows have in common."""
    types = {"raw": "*fp32", "ref_raw": "*fp32", "dz": "*bf16", "inner": "fp32", "outer": "fp32"}
    if bias:
        return {**types, "bias": "*bf16"}, {"BLOCK": 4096}
    return types, {"BLOCK": 4096, "bias": None}


def empty_dz(hidden: Tensor, rows: int, vocab: int) -> Tensor:
    """Rows 16 bytes apart at least, as the products want."""
    wide = -(-vocab // 16) * 16
    return torch.empty(rows, wide, dtype=launch.scratch_dtype(hidden), device=hidden.device)
