"""Contenders from hidden states to advantages (cases.linear_experience)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops import peers
from bench.ops.peers import Contender, Inputs, Outputs, ours
from gikernels import reference


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


def _in_one(op: Callable[..., Any], i: Inputs) -> Outputs:
    stats, out = op(
        i["hidden"],
        i["weight"],
        i["targets"],
        i["cu_seqlens"],
        i["ref_logprobs"],
        i["values"],
        i["scores"],
        peers.KL_COEF,
        norm="group",
        group_ids=i["group_ids"],
        num_groups=i["num_groups"],
    )
    fields = {name: getattr(out, name) for name in ("advantages", "returns", "moments")}
    return {"logprobs": stats.logprobs, **fields}


def _in_two(logprobs: Tensor, experience: Callable[..., Any], i: Inputs) -> Outputs:
    """Flat rows into (S, T), the experience of those, and back."""
    lengths = i["cu_seqlens"].diff()
    within = torch.arange(i["longest"], device=lengths.device) < lengths.unsqueeze(1)
    flat = {"logprobs": logprobs.detach(), "ref_logprobs": i["ref_logprobs"], "values": i["values"]}
    padded = {k: x.new_zeros(within.shape).masked_scatter(within, x) for k, x in flat.items()}
    out = peers.experience_of(experience, {**i, **padded, "mask": within})
    rows = {name: out[name][within] for name in ("advantages", "returns")}
    return {**out, **rows, "logprobs": logprobs}


def specified_linear_experience(i: Inputs) -> Outputs:
    return _in_one(reference.linear_experience, i)


def gikernels_linear_experience(i: Inputs) -> Outputs:
    return _in_one(ours("linear_experience"), i)


def gikernels_two_ops(i: Inputs) -> Outputs:
    return _in_two(peers.gikernels_linear_logprobs(i)["logprobs"], ours("experience"), i)


def torch_linear_experience(i: Inputs) -> Outputs:
    return _in_two(peers.torch_linear_logprobs(i)["logprobs"], reference.experience, i)


LINEAR_EXPERIENCE = (
    Contender("gikernels", gikernels_linear_experience, forward_only=True),
    Contender("gikernels, two ops", gikernels_two_ops, forward_only=True),
    Contender("torch", torch_linear_experience, forward_only=True),
)
