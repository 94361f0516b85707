"""The Triton half of support.py: products with a few rows of a table, where they lie.

Nothing of (rows x ids x D) is gathered into memory: each row that is named is read once, by the
program that multiplies it. Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid


@triton.jit(do_not_specialize=["K"])
def _dots_kernel(
    x,  # (n, D) contiguous
    table,  # (V, D)
    table_s,
    table_t,
    ids,  # (n, K) int64 contiguous
    out,  # (n, K) out, contiguous
    D,
    K,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i, k] = x[i] . table[ids[i, k]]: one row, some ids."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * IDS + tl.arange(0, IDS)
    there = k < K
    at = tl.load(ids + row * K + k, mask=there, other=0).to(tl.int64)[:, None] * table_s
    acc = tl.zeros((IDS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        left = tl.load(x + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        both = there[:, None] & inside[None, :]
        right = tl.load(table + at + cols[None, :] * table_t, mask=both, other=0.0)
        acc += left[None, :] * right.to(tl.float32)
    tl.store(out + row * K + k, tl.sum(acc, 1), mask=there)


@triton.jit
def _bags_kernel(
    ids,  # (nnz) int64
    factors,  # (nnz)
    offsets,  # (B + 1) int64
    table,  # (V, D)
    table_s,
    table_t,
    out,  # (B, D) out, contiguous
    D,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b] = sum over the ids of bag b of factor * table[id]: one bag, some columns. In the order
    of the bag, so that two runs agree in every bit."""
    bag = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    first = tl.load(offsets + bag)
    last = tl.load(offsets + bag + 1)
    acc = tl.zeros((IDS, BLOCK), tl.float32)
    for start in range(first, last, IDS):
        i = start + tl.arange(0, IDS)
        there = i < last
        at = tl.load(ids + i, mask=there, other=0).to(tl.int64)[:, None] * table_s
        factor = tl.load(factors + i, mask=there, other=0.0)
        both = there[:, None] & inside[None, :]
        row = tl.load(table + at + cols[None, :] * table_t, mask=both, other=0.0)
        acc += factor[:, None] * row.to(tl.float32)
    tl.store(out + bag * D + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=inside)


# At 8192 rows of 64 ids, D 4096, V 128256 in bf16 on an H200: dots in 1.1 ms, which is 3.9 TB/s,
# and 1.0 ms for bags of a row or of an id. Most bags of ids are small: at IDS 8 those took 5 ms.
DOTS = {"IDS": 16, "BLOCK": 256}
BAGS = {"IDS": 4, "BLOCK": 1024}


def dots(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """(n, K) in fp32 of x (n, D), table (V, D) and ids (n, K)."""
    n, k = ids.shape
    out = torch.empty(n, k, dtype=torch.float32, device=x.device)
    with grid.on(x.device):
        _dots_kernel[(n, triton.cdiv(k, DOTS["IDS"]))](
            x.contiguous(), table, *table.stride(), ids.contiguous(), out, x.shape[1], k, **DOTS
        )
    return out


def bags(
    ids: Tensor, table: Tensor, offsets: Tensor, factors: Tensor, dtype: torch.dtype
) -> Tensor:
    """(B, D) in `dtype` of the sums over bags ids[offsets[b] : offsets[b + 1]]."""
    size, depth = len(offsets) - 1, table.shape[1]
    out = torch.empty(size, depth, dtype=dtype, device=table.device)
    with grid.on(table.device):
        _bags_kernel[(size, triton.cdiv(depth, BAGS["BLOCK"]))](
            ids, factors, offsets, table, *table.stride(), out, depth, **BAGS
        )
    return out


def aot_cases() -> Iterator[dict[str, Any]]:
    for dtype in ("bf16", "fp32"):
        types = {"table": f"*{dtype}", "ids": "*i64", "offsets": "*i64"}
        for fn, cut in ((_dots_kernel, DOTS), (_bags_kernel, BAGS)):
            yield grid.aot_case(fn, f"{fn.__name__}_{dtype}", types, {"table_t": 1, **cut})
