"""The C++ half of experience.py, backend "cpp": csrc/experience.cpp through pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.experience_torch import mean_and_scale, merged_moments
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
    from gikernels import build  # here, so that `python -m gikernels.build` is imported once

    dtype, sequences = out.kl.dtype, len(scores)
    suffix = "f64" if dtype == torch.float64 else "f32"
    threads = torch.get_num_threads()

    def ready(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype).contiguous()

    if exact_kl is None and estimator != "k1":  # torch has exp() of a vector, C++ of a number
        exact_kl = kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)
    if kl_coefs is None:
        kl_coefs = scores.new_full((sequences,), kl_coef, dtype=dtype)
    if cu_seqlens is None:
        starts = torch.arange(sequences + 1) * logprobs.shape[1]
    else:
        starts = cu_seqlens.long().contiguous()
    mask = (kept if kept.dtype == torch.bool else kept != ignore_index).contiguous()
    moments = torch.empty(sequences, 3, dtype=torch.float64)
    inputs = [ready(x) for x in (logprobs, ref_logprobs, exact_kl, values)]
    inputs += [mask, ready(scores), ready(kl_coefs)]
    run = getattr(build.library("cpp"), f"gi_experience_cpu_{suffix}")
    run(
        starts.data_ptr(),
        sequences,
        threads,
        *(None if x is None else x.data_ptr() for x in inputs),
        gamma,
        lam,
        *(x.data_ptr() for x in (*out[:5], moments)),
    )
    if norm == "none":
        out.moments.zero_()
        return
    one_group = torch.zeros(sequences, dtype=torch.long)
    ids = one_group if group_ids is None else group_ids.long()
    merged = merged_moments(moments.T, ids, len(out.moments))
    out.moments.copy_(merged.T)
    if apply_norm:
        mean, scale = (x[ids] for x in mean_and_scale(merged, eps))
        run = getattr(build.library("cpp"), f"gi_normalise_cpu_{suffix}")
        places = (x.data_ptr() for x in (mask, mean, scale, out.advantages))
        run(starts.data_ptr(), sequences, threads, *places)
