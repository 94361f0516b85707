"""The Triton half of formed.py. Importing this module imports triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid

SCALE_BLOCK = 4096


@triton.jit
def _scale_kernel(
    x,  # (size) in and out
    by,  # (1)
    size,
    BLOCK: tl.constexpr,
):
    factor = tl.load(by).to(tl.float32)
    if factor != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size, other=0).to(tl.float32)
        tl.store(x + at, (value * factor).to(x.dtype.element_ty), mask=at < size)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor, in memory that is read and written only where the factor is not 1, as it
    is for loss.backward(): of a bf16 dW of 128256 x 4096 that is 2.1 GB. Nobody waits for it."""
    assert gradient.is_contiguous()
    if gradient.numel():
        with grid.on(gradient.device):
            _scale_kernel[(-(-gradient.numel() // SCALE_BLOCK),)](
                x=gradient, by=factor, size=gradient.numel(), BLOCK=SCALE_BLOCK
            )
    return gradient


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases() -> Iterator[dict[str, Any]]:
    yield grid.aot_case(
        _scale_kernel, "scale_bf16", {"x": "*bf16", "size": "i32"}, {"BLOCK": SCALE_BLOCK}
    )
