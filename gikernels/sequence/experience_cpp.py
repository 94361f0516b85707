"""The C++ half of experience.py, backend "cpp": csrc/experience.cpp through pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.reference import Experience, kl_estimate


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
) -> None:
    from gikernels.backends import build  # here: it needs fcntl, which Windows has not

    dtype, sequences = out.kl.dtype, len(scores)

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    if exact_kl is None and estimator != "k1":  # torch has exp() of a vector, C++ of a number
        exact_kl = kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)
    if kl_coefs is None:
        kl_coefs = scores.new_full((sequences,), kl_coef, dtype=dtype)
    if cu_seqlens is None:
        starts = torch.arange(0, logprobs.numel() + 1, logprobs.shape[1])
    else:
        starts = cu_seqlens.long().contiguous()
    inputs = (
        *(ready(x) for x in (logprobs, ref_logprobs, exact_kl, values)),
        (kept if kept.dtype == torch.bool else kept != ignore_index).contiguous(),
        *(ready(x) for x in (scores, kl_coefs)),
        None if group_ids is None else group_ids.long().contiguous(),
    )
    suffix = "f64" if dtype == torch.float64 else "f32"
    run = getattr(build.library("cpp"), f"gi_experience_cpu_{suffix}")
    run(
        starts.data_ptr(),
        sequences,
        torch.get_num_threads(),
        *(None if x is None else x.data_ptr() for x in inputs),
        0 if norm == "none" else len(out.moments),
        gamma,
        lam,
        eps,
        apply_norm,
        *(x.data_ptr() for x in out),
    )
    if norm == "none":
        out.moments.zero_()
