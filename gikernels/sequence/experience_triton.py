"""The Triton half of experience.py: launchers, cases for ahead-of-time compilation.

Imported when the first kernel is launched. The kernels are in experience_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import grid
from gikernels.reference import Experience, Gae
from gikernels.sequence.experience_kernels import experience_kernel, gae_kernel, normalize_kernel

TILE = 1024  # elements a program holds: 8 a thread
WARPS = 4
# A cooperative launch wants all its programs resident. 128 registers for each of 128 threads let
# four share the 65536 of a processor: 512 sequences are then one wave on 132 processors, where
# three would need two. Two variants spill a few numbers for it.
MAX_REGISTERS = 128
PROGRAMS_PER_PROCESSOR = 4
BLOCK = 512  # partial moments merged at a time


def _shape_of_tile(steps: int, flat: bool = False) -> dict[str, int]:
    """A tile is one long row, or several short ones. Flat rows are addressed one by one and their
    masks are 64-bit targets: with 8 a thread that took 158 registers."""
    size = TILE // 2 if flat else TILE
    bt = min(size, max(16, triton.next_power_of_2(steps)))
    return {"ROWS": size // bt, "BT": bt}


def _divide(gamma: float, lam: float) -> bool:
    """At less, dividing by gamma * lam would cost more than two bits."""
    return gamma * lam >= 0.25


def _scalar_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _strides(x: Tensor) -> tuple[int, int]:
    return (x.stride(0), x.stride(1)) if x.dim() == 2 else (0, x.stride(0))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
    out: Gae,
) -> None:
    s, t = rewards.shape
    tile = _shape_of_tile(t)
    with grid.on(rewards.device):
        gae_kernel[(triton.cdiv(s, tile["ROWS"]),)](
            rewards,
            *_strides(rewards),
            values,
            *_strides(values),
            mask,
            *_strides(mask),
            values if last_values is None else last_values.contiguous(),
            *out,
            s,
            t,
            gamma=gamma,
            lam=lam,
            DIVIDE=_divide(gamma, lam),
            HAS_LAST=last_values is not None,
            STAT=_scalar_type(out.returns.dtype),
            num_warps=WARPS,
            **tile,
        )


def experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    kept: Tensor,
    kl_coefs: Tensor | None,
    kl_coef: float,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    exact_kl: Tensor | None,
    gamma: float,
    lam: float,
    estimator: str,
    norm: str,
    eps: float,
    apply_norm: bool,
    ignore_index: int,
    out: Experience,
    *,
    programs: int | None = None,
    resident: bool | None = None,
) -> None:
    """`programs` and `resident` are for tests, which have no GPU to choose by."""
    device, dtype = out.kl.device, out.kl.dtype
    flat, by_group = cu_seqlens is not None, norm == "group"
    sequences, tokens, num_groups = len(scores), out.kl.numel(), len(out.moments)
    if kl_coefs is None and dtype == torch.float64:  # a number reaches the kernel as float32
        kl_coefs = scores.new_full((sequences,), kl_coef, dtype=dtype)
    steps = tokens // sequences
    tile = _shape_of_tile(steps, flat)
    tiles = triton.cdiv(sequences, tile["ROWS"])
    if resident is None:
        resident = device.type == "cuda" and norm != "none"
    if programs is None:
        programs = tiles
        if resident:
            programs = min(tiles, PROGRAMS_PER_PROCESSOR * grid.processors(device))
    if exact_kl is not None:
        logprobs, estimator = exact_kl, "exact"
    unused = scores
    with grid.on(device):
        experience_kernel[(programs,)](
            logprobs,
            *_strides(logprobs),
            ref_logprobs,
            *_strides(ref_logprobs),
            logprobs if values is None else values,
            *_strides(logprobs if values is None else values),
            kept,
            *_strides(kept),
            scores.contiguous(),
            unused if kl_coefs is None else kl_coefs.contiguous(),
            kl_coef,
            unused if cu_seqlens is None else cu_seqlens.contiguous(),
            unused if group_ids is None else group_ids.contiguous(),
            *out,
            scores.new_empty(3, sequences if by_group else programs, dtype=torch.float64),
            scores.new_empty(3, num_groups, dtype=torch.float64),
            unused if norm == "none" else grid.counters(device),
            sequences,
            0 if flat else steps,
            tokens,
            num_groups,
            ignore_index,
            gamma=gamma,
            lam=lam,
            eps=eps,
            ESTIMATOR=estimator,
            NORM=norm,
            APPLY=apply_norm,
            HAS_VALUES=values is not None,
            DIVIDE=_divide(gamma, lam),
            FLAT=flat,
            KEPT_IS_TARGET=kept.dtype != torch.bool,
            COEF_PER_SEQUENCE=kl_coefs is not None,
            RESIDENT=resident,
            STAT=_scalar_type(dtype),
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
            # The moments are those of the advantages as they are stored. A fused multiply-add would
            # take them before they are rounded, and a group of one token would not be zero.
            enable_fp_fusion=False,
            launch_cooperative_grid=resident,
            **tile,
        )


def normalize(
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor,
    group_ids: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    n = out.numel()
    with grid.on(out.device):
        normalize_kernel[(triton.cdiv(n, TILE),)](
            advantages.contiguous(),
            mask.contiguous(),
            moments.contiguous(),
            mask if group_ids is None else group_ids.contiguous(),
            out,
            n,
            out.shape[1] if out.dim() == 2 else 1,
            len(moments),
            eps=eps,
            BY_ID=group_ids is not None,
            BLOCK=TILE,
            STAT=_scalar_type(out.dtype),
            num_warps=WARPS,
        )


# --- ahead-of-time compilation ------------------------------------------------------------------


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every kernel as it is launched for fp32 tensors with T a multiple of 16, for a test that
    compiles them for GPUs that the machine does not have."""
    tile = _shape_of_tile(TILE)
    numbers = {"gamma": "fp64", "lam": "fp64", "eps": "fp64", "kl_coef": "fp32"}
    stat = {"STAT": tl.float32}
    yield grid.aot_case(
        gae_kernel,
        "gae",
        {"mask": "*i1", **numbers},
        {
            **stat,
            "HAS_LAST": False,
            "DIVIDE": True,
            **tile,
            "rewards_t": 1,
            "values_t": 1,
            "mask_t": 1,
        },
    )
    for norm, flat, values in (
        ("none", False, True),
        ("batch", False, True),
        ("group", False, True),
        ("group", True, True),
        ("batch", False, False),
    ):
        yield grid.aot_case(
            experience_kernel,
            f"experience-{norm}{'-flat' * flat}{'-no-critic' * (not values)}",
            {
                "kept": "*i64" if flat else "*i1",
                **numbers,
                "cu_seqlens": "*i64" if flat else "*fp32",
                "group_ids": "*i64" if norm == "group" else "*fp32",
                "partials": "*fp64",
                "merged": "*fp64",
                "counter": "*i64",
                # of no use to flat rows, 0 there
                **dict.fromkeys(("logprobs_s", "ref_s", "values_s", "kept_s"), "i32"),
            },
            {
                **stat,
                **dict.fromkeys(("logprobs_t", "ref_t", "values_t", "kept_t"), 1),
                "ESTIMATOR": "k3" if norm == "none" else "k1",
                "NORM": norm,
                "APPLY": True,
                "HAS_VALUES": values,
                "DIVIDE": True,
                "FLAT": flat,
                "KEPT_IS_TARGET": flat,
                "COEF_PER_SEQUENCE": norm == "group",
                "RESIDENT": norm != "none",
                "BLOCK": BLOCK,
                **_shape_of_tile(TILE, flat),
            },
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=False,
        )
    yield grid.aot_case(
        normalize_kernel,
        "normalize_advantages",
        {"mask": "*i1", "group_ids": "*i64", **numbers},
        {"BY_ID": True, "BLOCK": TILE, "STAT": tl.float32},
    )
