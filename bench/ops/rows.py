"""Peers of the operations on given tokens and on whole distributions (cases.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.peers import Contender, Inputs, Outputs, compiled, ours
from gikernels import reference


class Parts(NamedTuple):
    """What a case is made of beside a head and hidden states."""

    more: Callable[[Inputs, torch.Generator], Inputs]
    specified: Callable[[Inputs], Outputs]
    peers: tuple[Contender, ...]
    again: bool  # whether the backward computes the logits again


def gather_inputs(given: Inputs, rng: torch.Generator) -> Inputs:
    n, v, device = len(given["hidden"]), len(given["weight"]), given["hidden"].device
    return {**given, "ids": torch.randint(v, (n, 16), device=device, generator=rng)}


def specified_gather(i: Inputs) -> Outputs:
    return {"logprobs": reference.linear_gather_logprobs(i["hidden"], i["weight"], i["ids"])}


def gikernels_gather(i: Inputs) -> Outputs:
    found = ours("linear_gather_logprobs")(i["hidden"], i["weight"], i["ids"])
    return {"logprobs": found}


def torch_gather(i: Inputs) -> Outputs:
    logp = F.linear(i["hidden"], i["weight"]).float().log_softmax(-1)
    return {"logprobs": logp.gather(1, i["ids"])}


def compiled_gather(i: Inputs) -> Outputs:
    return compiled(torch_gather, i["hidden"])(i)


GATHER = Parts(
    gather_inputs,
    specified_gather,
    (
        Contender("gikernels", gikernels_gather),
        Contender("torch", torch_gather),
        Contender("torch.compile", compiled_gather),
    ),
    True,
)


def divergence_inputs(given: Inputs, rng: torch.Generator) -> Inputs:
    x, w = given["hidden"], given["weight"]
    noise = torch.randn(x.shape, device=x.device, generator=rng)
    mask = torch.rand(len(x), device=x.device, generator=rng) < 0.9
    ref = ((x.float() + noise).to(x.dtype), w.clone())
    return {**given, "ref": ref, "mask": mask, "denom": mask.sum()}


def gikernels_divergence(i: Inputs) -> Outputs:
    out = ours("linear_divergence")(
        i["hidden"], i["weight"], i["ref"], kind="jsd", mask=i["mask"], denom=i["denom"].float()
    )
    return {"loss": out.loss}


def specified_divergence(i: Inputs) -> Outputs:
    ref = tuple(x.to(i["hidden"].dtype) for x in i["ref"])
    out = reference.linear_divergence(
        i["hidden"], i["weight"], ref, kind="jsd", mask=i["mask"], denom=i["denom"]
    )
    return {"loss": out.loss}


def torch_divergence(i: Inputs) -> Outputs:
    """As trainers write it: both log-softmaxes, the middle, two KLs."""
    x, w = i["ref"]
    log_p = F.linear(i["hidden"], i["weight"]).float().log_softmax(-1)
    log_q = F.linear(x, w).float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=x.device))

    def kl(a: Tensor) -> Tensor:
        return F.kl_div(log_m, a, reduction="none", log_target=True).sum(-1)

    each = (kl(log_p) + kl(log_q)) / 2
    return {"loss": (each * i["mask"]).sum() / i["denom"]}


def compiled_divergence(i: Inputs) -> Outputs:
    return compiled(torch_divergence, i["hidden"])(i)


DIVERGENCE = Parts(
    divergence_inputs,
    specified_divergence,
    (
        Contender("gikernels", gikernels_divergence),
        Contender("torch", torch_divergence),
        Contender("torch.compile", compiled_divergence),
    ),
    False,
)
