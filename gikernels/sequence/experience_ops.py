"""The custom operations behind experience.py, and which half runs them: experience_triton.py, where
all of it is one launch, experience_cpp.py, which calls csrc/, or experience_torch.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.symbols import settled
from gikernels.reference import Experience, Gae, stat_dtype

BACKENDS = ("triton", "reference")
EXPERIENCE_BACKENDS = ("triton", "cpp", "reference")


def _half(chosen: str) -> Any:
    """Each has gae, experience and normalize, which write into their last argument; C++ has the
    second only, as the others are a small part of its work."""
    if chosen == "triton":
        from gikernels.sequence import experience_triton

        return experience_triton
    if chosen == "cpp":
        from gikernels.sequence import experience_cpp

        return experience_cpp
    from gikernels.sequence import experience_torch

    return experience_torch


# What they return is constant to PPO, which differentiates the policy and the critic at fixed
# advantages and returns: the outputs are marked so, whatever the inputs.


def _constant(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise AssertionError("every output is a constant")


def _blank_gae(rewards: Tensor, values: Tensor) -> Gae:
    def empty() -> Tensor:
        return rewards.new_empty(rewards.shape, dtype=stat_dtype(rewards, values))

    return Gae(empty(), empty())


@torch.library.custom_op("gikernels::gae", mutates_args=())
def gae_op(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
    carried: Tensor | None = None,  # the numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor]:
    gamma, lam = settled(carried, gamma, lam)
    out = _blank_gae(rewards, values)
    chosen = dispatch.choose(backend, rewards, BACKENDS)
    if out.returns.numel():
        with torch.autocast(rewards.device.type, enabled=False):
            _half(chosen).gae(rewards, values, mask, last_values, gamma, lam, out)
    return out


@gae_op.register_fake
def _(rewards, values, mask, last_values, gamma, lam, backend, carried=None):
    return _blank_gae(rewards, values)


def _blank_experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    num_groups: int,
) -> Experience:
    """The results, unwritten and contiguous."""
    dtype = stat_dtype(logprobs, ref_logprobs, values, scores)

    def empty(*shape: int) -> Tensor:
        return logprobs.new_empty(shape, dtype=dtype)

    rewards, kl, advantages, returns = (empty(*logprobs.shape) for _ in range(4))
    seq_kl, moments = empty(scores.shape[0]), empty(num_groups, 3)
    return Experience(rewards, kl, advantages, returns, seq_kl, moments)


@torch.library.custom_op("gikernels::experience", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS)
def experience_op(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    kept: Tensor,  # the mask, or targets where ignore_index means masked
    kl_coefs: Tensor | None,  # (S), then kl_coef is not used
    kl_coef: float,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    exact_kl: Tensor | None,
    num_groups: int,
    gamma: float,
    lam: float,
    estimator: str,
    norm: str,
    eps: float,
    apply_norm: bool,
    ignore_index: int,
    backend: str,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kl_coef, gamma, lam, eps = settled(carried, kl_coef, gamma, lam, eps)
    if group_ids is not None:
        checks.ids_within("group_ids", group_ids, num_groups)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, len(logprobs))
    out = _blank_experience(logprobs, ref_logprobs, values, scores, num_groups)
    chosen = dispatch.choose(backend, logprobs, EXPERIENCE_BACKENDS)
    if out.kl.numel() == 0:
        out.seq_kl.zero_()
        out.moments.zero_()
        return out
    with torch.autocast(logprobs.device.type, enabled=False):
        _half(chosen).experience(
            logprobs,
            ref_logprobs,
            values,
            scores,
            kept,
            kl_coefs,
            kl_coef,
            cu_seqlens,
            group_ids,
            exact_kl,
            gamma,
            lam,
            estimator,
            norm,
            eps,
            apply_norm,
            ignore_index,
            out,
        )
    return out


@experience_op.register_fake
def _(logprobs, ref_logprobs, values, scores, kept, kl_coefs, kl_coef, cu_seqlens, group_ids,
      exact_kl, num_groups, *numbers):  # fmt: skip
    return _blank_experience(logprobs, ref_logprobs, values, scores, num_groups)


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> None:
    """On a GPU, which is not waited for, the kernel stays within the tensors whatever it finds."""
    if cu_seqlens.device.type != "cpu":
        return
    falls = bool((cu_seqlens[1:] < cu_seqlens[:-1]).any())
    if falls or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows:
        raise ValueError(f"cu_seqlens: got {cu_seqlens}, want a rise from 0 to N = {rows}")


@torch.library.custom_op("gikernels::normalize_advantages", mutates_args=())
def normalize_op(
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor,
    group_ids: Tensor | None,
    eps: float,
    backend: str,
    carried: Tensor | None = None,
) -> Tensor:
    (eps,) = settled(carried, eps)
    if group_ids is not None:
        checks.ids_within("group_ids", group_ids, len(moments))
    out = advantages.new_empty(advantages.shape, dtype=stat_dtype(advantages, moments))
    chosen = dispatch.choose(backend, advantages, BACKENDS)
    if out.numel():
        _half(chosen).normalize(advantages, mask, moments, group_ids, eps, out)
    return out


@normalize_op.register_fake
def _(advantages, mask, moments, group_ids, eps, backend, carried=None):
    return advantages.new_empty(advantages.shape, dtype=stat_dtype(advantages, moments))


for _op in (gae_op, experience_op, normalize_op):
    _op.register_autograd(_no_gradient, setup_context=_constant)
