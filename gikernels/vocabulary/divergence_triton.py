"""The Triton half of linear_divergence: all terms and dZ of a row in one program.

Read downward: kernel, the loop over chunks, cases for ahead-of-time compilation. Importing this
module imports triton.
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
from gikernels.vocabulary.head import spans
from gikernels.vocabulary.totals import Pair

TINY: tl.constexpr = tl.constexpr(1.1754944e-38)


@triton.jit
def _log_probs(
    raw, bias, start, V, inner, outer, peak, log_total,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    z = logit_rows.final(raw, bias, start, V, inner, outer, SOFTCAP, BLOCK)
    # One after the other: their sum would round at a large offset.
    return z, z - peak - log_total


@triton.jit
def _log_middle(p, q, mix):
    return tl.log(tl.maximum(mix * p + (1 - mix) * q, TINY))


@triton.jit(do_not_specialize=["dz_n", "mix"])
def _divergence_kernel(
    raw,  # (N, V)
    ref_raw,  # (N, V)
    bias,  # (V) or None
    temperatures,  # (N)
    factors,  # (N) what dZ is multiplied by
    values,  # (N) out
    dz,  # (N, V) out, rows dz_n apart; None: no gradient is wanted
    V,
    dz_n,
    inner,
    outer,
    mix,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outer_row = outer / tl.load(temperatures + row)
    raw += row * V
    ref_raw += row * V
    peak, total = logit_rows.sum_of_row(raw, bias, V, inner, outer_row, SOFTCAP, BLOCK)
    ref_peak, ref_total = logit_rows.sum_of_row(ref_raw, None, V, inner, outer_row, SOFTCAP, BLOCK)
    log_total, ref_log_total = tl.log(total), tl.log(ref_total)
    value = tl.zeros((1,), tl.float32)
    own = tl.zeros((1,), tl.float32)  # the KL that dZ subtracts
    for start in range(0, V, BLOCK):
        _, log_p = _log_probs(
            raw, bias, start, V, inner, outer_row, peak, log_total, SOFTCAP, BLOCK
        )
        _, log_q = _log_probs(
            ref_raw, None, start, V, inner, outer_row, ref_peak, ref_log_total, SOFTCAP, BLOCK
        )
        p, q = tl.exp(log_p), tl.exp(log_q)
        # What is never drawn adds nothing, whatever the other thinks of it.
        if KIND == "reverse":
            own += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 1)
        elif KIND == "forward":
            value += tl.sum(tl.where(q > 0, q * (log_q - log_p), 0.0), 1)
        else:
            log_m = _log_middle(p, q, mix)
            own += tl.sum(tl.where(p > 0, p * (log_p - log_m), 0.0), 1)
            value += tl.sum(tl.where(q > 0, q * (log_q - log_m), 0.0), 1)
    if KIND == "reverse":
        value = own
    elif KIND == "jsd":
        value = mix * own + (1 - mix) * value
    tl.store(values + row + tl.arange(0, 1), value)
    if dz is not None:
        factor = tl.load(factors + row)
        if KIND == "jsd":
            factor *= mix
        for start in range(0, V, BLOCK):
            z, log_p = _log_probs(
                raw, bias, start, V, inner, outer_row, peak, log_total, SOFTCAP, BLOCK
            )
            _, log_q = _log_probs(
                ref_raw, None, start, V, inner, outer_row, ref_peak, ref_log_total, SOFTCAP, BLOCK
            )
            p, q = tl.exp(log_p), tl.exp(log_q)
            if KIND == "forward":
                grad = p - q
            elif KIND == "reverse":
                grad = tl.where(p > 0, p * (log_p - log_q - own), 0.0)
            else:
                grad = tl.where(p > 0, p * (log_p - _log_middle(p, q, mix) - own), 0.0)
            grad *= factor
            slope = tiles.logit_slope(z, inner, outer_row, SOFTCAP)
            cols = start + tl.arange(0, BLOCK)
            tl.store(
                dz + row * dz_n + cols[None, :],
                (grad * slope).to(dz.dtype.element_ty),
                mask=(cols < V)[None, :],
            )


def chunked(
    pair: Pair, kind: str, mix: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Divergences (n), and the gradients of hidden, weight and bias."""
    n, v, device = len(pair.x), len(pair.head.weight), pair.x.device
    itemsize = 8 + (launch.scratch_dtype(pair.x).itemsize if any(wanted) else 0)
    tall = logit_rows.tall(n, v, workspace_for(device), itemsize)
    sums = launch.Gradients(pair.x, pair.head.weight, -(-n // tall), wanted)
    scratch = logit_rows.empty_dz(pair.x, tall, v) if any(wanted) else None
    values = torch.empty(n, dtype=torch.float32, device=device)
    for rows in spans(n, tall):
        some = pair.rows(rows)
        raw = logit_rows.raw_logits(some.x, some.head)
        ref_raw = logit_rows.raw_logits(some.ref_x, some.ref_head)
        dz = None if scratch is None else scratch[: len(raw), :v]
        with grid.on(device):
            _divergence_kernel[(len(raw),)](
                raw=raw,
                ref_raw=ref_raw,
                factors=some.factor.contiguous(),
                values=values[rows],
                dz=dz,
                dz_n=0 if dz is None else dz.stride(0),
                mix=mix,
                KIND=kind,
                **logit_rows.arguments(some.head, some.temperature, logit_rows.block_of(v)),
            )
        del raw, ref_raw  # before the next are made
        if dz is not None:
            sums.add(rows, some.x, dz)
    return values, sums.all()


def aot_cases() -> Iterator[dict[str, Any]]:
    for kind, bias in (("reverse", False), ("jsd", True)):
        types, constants = logit_rows.aot_types(bias)
        yield grid.aot_case(
            _divergence_kernel,
            f"divergence_kernel_{kind}",
            {**types, "mix": "fp32", "dz_n": "i32"},
            {**constants, "SOFTCAP": bias, "KIND": kind},
            num_warps=8,
        )
