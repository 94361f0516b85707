"""Contenders from hidden states to advantages (cases.linear_experience)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.peers import Contender, Inputs, Outputs, ours
from gikernels import reference

KL_COEF = 0.05


def packed(given: Inputs, sequences: int, rng: torch.Generator) -> Inputs:
    """A head's rows (N) as so many sequences of uneven lengths, and what is known of each."""
    n, device = len(given["hidden"]), given["hidden"].device
    usual = n // sequences
    cuts = torch.arange(1, sequences, device=device) * usual
    cuts += torch.randint(-(usual // 4), usual // 4 + 1, cuts.shape, device=device, generator=rng)
    cu_seqlens = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), n)])

    def noise(size: int) -> Tensor:
        return torch.randn(size, device=device, generator=rng)

    return {
        **given,
        "cu_seqlens": cu_seqlens,
        "longest": int(cu_seqlens.diff().max()),
        "ref_logprobs": noise(n).abs().neg(),
        "values": noise(n),
        "scores": noise(sequences),
        "group_ids": torch.randint(4, (sequences,), device=device, generator=rng),
        "num_groups": 4,
    }


def _linear_experience(op: Callable[..., Any], i: Inputs) -> Outputs:
    stats, out = op(
        i["hidden"],
        i["weight"],
        i["targets"],
        i["cu_seqlens"],
        i["ref_logprobs"],
        i["values"],
        i["scores"],
        KL_COEF,
        norm="group",
        group_ids=i["group_ids"],
        num_groups=i["num_groups"],
    )
    return _named(stats.logprobs, out.advantages, out.returns, out.moments)


def specified_linear_experience(i: Inputs) -> Outputs:
    return _linear_experience(reference.linear_experience, i)


def gikernels_linear_experience(i: Inputs) -> Outputs:
    return _linear_experience(ours("linear_experience"), i)


def _named(logprobs: Tensor, advantages: Tensor, returns: Tensor, moments: Tensor) -> Outputs:
    return {
        "logprobs": logprobs,
        "advantages": advantages,
        "returns": returns,
        "moments": moments,
    }


def _padded(logprobs: Tensor, experience: Callable[..., Any], i: Inputs) -> Outputs:
    """Flat rows into (S, T), the experience of those, and back."""
    lengths = i["cu_seqlens"].diff()
    steps = torch.arange(i["longest"], device=lengths.device)
    within = steps < lengths.unsqueeze(1)

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(within.shape).masked_scatter(within, x)

    out = experience(
        pad(logprobs.detach()),
        pad(i["ref_logprobs"]),
        pad(i["values"]),
        i["scores"],
        within,
        KL_COEF,
        norm="group",
        group_ids=i["group_ids"],
        num_groups=i["num_groups"],
    )
    return _named(logprobs, out.advantages[within], out.returns[within], out.moments)


def gikernels_two_ops(i: Inputs) -> Outputs:
    stats = ours("linear_logprobs")(i["hidden"], i["weight"], i["targets"])
    return _padded(stats.logprobs, ours("experience"), i)


def torch_linear_experience(i: Inputs) -> Outputs:
    z = F.linear(i["hidden"], i["weight"])
    logp = (z.float() if z.dtype != torch.float64 else z).log_softmax(-1)
    logprobs = logp.gather(-1, i["targets"].unsqueeze(-1)).squeeze(-1)
    return _padded(logprobs, reference.experience, i)


LINEAR_EXPERIENCE = (
    Contender("gikernels", gikernels_linear_experience, forward_only=True),
    Contender("gikernels, two ops", gikernels_two_ops, forward_only=True),
    Contender("torch", torch_linear_experience, forward_only=True),
)
