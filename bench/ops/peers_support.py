"""Contenders for rows that kept some tokens (cases.linear_logprobs_support)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.ops.peers import Contender, Inputs, Outputs, ours, token_stats
from gikernels.reference import Support


def gikernels_support(i: Inputs) -> Outputs:
    kept = Support(i["offsets"], i["ids"])
    op = ours("linear_logprobs")
    return token_stats(op(i["hidden"], i["weight"], i["targets"], support=kept))


def torch_support(i: Inputs) -> Outputs:
    """Same-dtype plain PyTorch with a mask of the kept tokens."""
    rows = torch.arange(len(i["targets"]), device=i["ids"].device)
    z = F.linear(i["hidden"], i["weight"])
    mask = torch.ones_like(z, dtype=torch.bool)
    mask[rows.repeat_interleave(i["offsets"].diff()), i["ids"]] = False
    z = z.float() if z.dtype != torch.float64 else z
    logp = z.masked_fill(mask, -torch.inf).log_softmax(-1)
    picked = logp.gather(-1, i["targets"].unsqueeze(-1)).squeeze(-1)
    return {"logprobs": picked, "entropy": -(logp.exp() * logp.masked_fill(mask, 0)).sum(-1)}


LINEAR_LOGPROBS_SUPPORT = (
    Contender("gikernels", gikernels_support),
    Contender("torch", torch_support),
)
