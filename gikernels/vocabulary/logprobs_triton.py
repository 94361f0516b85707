"""The launchers of logprobs_kernels.py, imported when a kernel is first launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gikernels.backends import grid
from gikernels.reference import stat_dtype
from gikernels.vocabulary.logprobs_chunk import Transform, row_view
from gikernels.vocabulary.logprobs_kernels import backward_kernel, forward_kernel, merge_kernel

# A tile is LANES x VEC logits, where VEC of them are one 16-byte load of one thread. Each lane has
# sums of its own: threads wait for each other once a row, not once a tile.
LANES = 512
BACKWARD_BLOCK = 2048  # 1.20 ms at 8192 x 128256 on an H200; 1.47 ms at 4096, 1.24 at 1024


def _splits(rows: int, vocab: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(splits, span): a row is shared where the rows alone cannot fill the GPU."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(4 * processors, rows)  # 4 programs of 128 threads on each
    span = triton.cdiv(triton.cdiv(vocab, tile), wanted) * tile
    return triton.cdiv(vocab, span), span


def _layout(prefix: str, x: Tensor) -> dict[str, int]:
    """Where the rows of x (A, B, V) lie. The stride of a single A is N * V, which nobody needs, and
    which would compile a kernel more where it is no multiple of 16."""
    a, b, v = x.stride()
    strides = {"stride_a": a if len(x) > 1 else 0, "stride_b": b, "stride_v": v}
    return {prefix + name: size for name, size in {"width": x.shape[1], **strides}.items()}


def _arguments(
    logits: Tensor, targets: Tensor, has_ref: bool, how: Transform, ignore_index: int
) -> dict[str, Any]:
    """What all kernels take: where the rows lie, and how their logits become final ones."""
    x = row_view(logits)
    temperature, temperatures = 1.0, x  # any pointer will do where none is read
    if isinstance(how.temperature, Tensor):
        temperatures = how.temperature.contiguous()
    else:
        temperature = how.temperature
    scale = abs(how.logit_scale)
    if how.softcap is None:
        inner, factor = 1.0, scale / temperature
    else:
        inner, factor = scale / how.softcap, how.softcap / temperature
    return {
        "logits": x,
        "targets": targets.contiguous(),
        "temperatures": temperatures,
        "vocab": x.shape[2],
        **_layout("", x),
        "inner": inner,
        "factor": factor,
        "ignore_index": ignore_index,
        "HAS_REF": has_ref,
        "HAS_TEMPERATURES": isinstance(how.temperature, Tensor),
        "SOFTCAP": how.softcap is not None,
        "NEGATIVE": how.logit_scale < 0,
    }


def _ref_arguments(ref_logits: Tensor) -> dict[str, Any]:
    x = row_view(ref_logits)
    return {"ref_logits": x, **_layout("ref_", x)}


def forward(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None, how: Transform, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, n, has_ref = stat_dtype(logits), len(targets), ref_logits is not None
    # Zeros, which the kernels leave where a row is ignored.
    logprobs, entropy = (logits.new_zeros(n, dtype=dtype) for _ in range(2))
    kl = logits.new_zeros(n if has_ref else 0, dtype=dtype)
    norms = logits.new_zeros(n, 4 if has_ref else 2, dtype=dtype)
    if n == 0:
        return logprobs, entropy, kl, norms
    vec = 16 // logits.element_size()
    splits, span = _splits(n, logits.shape[-1], LANES * vec, logits.device)
    arguments = _arguments(logits, targets, has_ref, how, ignore_index) | {
        "logprobs": logprobs,
        "entropy": entropy,
        "kl": kl,
        "norms": norms,
        "partial": norms.new_empty(n, splits, 8) if splits > 1 else norms,
        "splits": splits,
    }
    with grid.on(logits.device):
        forward_kernel[(n * splits,)](
            **arguments,
            **_ref_arguments(logits if ref_logits is None else ref_logits),
            span=span,
            SHARED=splits > 1,
            PTX=logits.is_cuda and torch.version.hip is None and dtype == torch.float32,
            LANES=LANES,
            VEC=vec,
            num_warps=4,
        )
        if splits > 1:
            merge_kernel[(n,)](**arguments, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return logprobs, entropy, kl, norms


def backward(
    grads: tuple[Tensor, Tensor, Tensor],  # of logprobs, entropy, kl
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    saved: tuple[Tensor, Tensor],  # entropy, norms
    how: Transform,
    ignore_index: int,
) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if dlogits.numel() == 0:
        return dlogits
    with grid.on(logits.device):
        backward_kernel[(len(targets), triton.cdiv(logits.shape[-1], BACKWARD_BLOCK))](
            dlogits,
            *(grad.contiguous() for grad in grads),
            entropy=saved[0],
            norms=saved[1],
            **_arguments(logits, targets, ref_logits is not None, how, ignore_index),
            **_ref_arguments(logits if ref_logits is None else ref_logits),
            BLOCK=BACKWARD_BLOCK,
            num_warps=4,
        )
    return dlogits


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases():
    """For tests/gikernels/test_aot.py: the cheapest and the dearest variant of each kernel."""
    for kernel, num_warps in ((forward_kernel, 4), (merge_kernel, 1), (backward_kernel, 4)):
        for dtype, full, ptx in (
            ("bf16", False, True),
            ("bf16", True, True),
            ("fp32", False, True),
            ("bf16", False, False),
        ):
            constants = {
                "HAS_REF": full,
                "HAS_TEMPERATURES": full,
                "SOFTCAP": full,
                "NEGATIVE": False,
                "SHARED": full,
                "PTX": ptx,
                "LANES": LANES,
                "VEC": 4 if dtype == "fp32" else 8,
                "SPLITS": 16,
                "BLOCK": BACKWARD_BLOCK,
                "stride_v": 1,  # Triton makes constants of arguments that are 1
                "ref_stride_v": 1,
            }
            numbers = dict.fromkeys(("inner", "factor"), "fp64")
            aligned = dict.fromkeys(("logits", "ref_logits", "dlogits"), f"*{dtype}")
            aligned |= {"targets": "*i64", "vocab": "i32"}
            aligned |= dict.fromkeys(
                ("ignore_index", "splits", "span", "width", "ref_width"), "i32"
            )
            aligned |= dict.fromkeys(
                ("stride_a", "stride_b", "ref_stride_a", "ref_stride_b"), "i32"
            )
            types = dict.fromkeys(constants, "constexpr") | numbers | aligned
            names = kernel.arg_names
            yield {
                "name": dtype + " ref softcap temperatures" * full + " no ptx" * (not ptx),
                "fn": kernel,
                "signature": {name: types.get(name, "*fp32") for name in names},
                "constexprs": {name: constants[name] for name in names if name in constants},
                "attrs": {
                    (i,): [["tt.divisibility", 16]]
                    for i, p in enumerate(kernel.params)
                    if not (p.name in constants or p.name in numbers or p.do_not_specialize)
                },
                "num_warps": num_warps,
                "num_stages": 2,
                "archs": ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120") if ptx else ("gfx942",),
            }
