"""The peers: how each is called, what it computes, and what it lacks.

A contender's `run(inputs)` returns what it computes under our names, for the inputs of its case
(cases.py). Peers are imported when they are run; one that is not installed, or not able to run on
this machine, raises and is reported with its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import baselines

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


class Absent(RuntimeError):
    """Why a contender does not run here."""


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[Inputs], Outputs]
    lacks: str = ""  # of what our op computes
    forward_only: bool = False


def needs_gpu(x: Tensor, what: str) -> None:
    if not x.is_cuda:
        raise Absent(f"{what} has no CPU path")


def ours(name: str) -> Any:
    """A function of gikernels by name."""
    import gikernels

    if not hasattr(gikernels, name):
        raise Absent(f"gikernels.{name} is not there yet")
    return getattr(gikernels, name)


def token_stats(stats: Any) -> Outputs:
    return {"logprobs": stats.logprobs, "entropy": stats.entropy}


_compiled: dict[Callable, Callable] = {}


def compiled(fn: Callable[[Inputs], Outputs], x: Tensor) -> Callable[[Inputs], Outputs]:
    """torch.compile for these very shapes; on a CPU it would need a C++ compiler."""
    needs_gpu(x, "torch.compile in this benchmark")
    return _compiled.setdefault(fn, torch.compile(fn, dynamic=False))


def forget_compiled() -> None:
    if _compiled:
        torch.compiler.reset()
        _compiled.clear()


# --- from hidden states -------------------------------------------------------------------------


def gikernels_linear_logprobs(i: Inputs) -> Outputs:
    return token_stats(ours("linear_logprobs")(i["hidden"], i["weight"], i["targets"]))


def _stats(z: Tensor, targets: Tensor) -> Outputs:
    logp = z.float().log_softmax(-1) if z.dtype != torch.float64 else z.log_softmax(-1)
    picked = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return {"logprobs": picked, "entropy": -(logp.exp() * logp).sum(-1)}


def torch_linear_logprobs(i: Inputs) -> Outputs:
    """Same-dtype plain PyTorch: the product in the dtype of the inputs, then a float softmax."""
    return _stats(F.linear(i["hidden"], i["weight"]), i["targets"])


def compiled_linear_logprobs(i: Inputs) -> Outputs:
    return compiled(torch_linear_logprobs, i["hidden"])(i)


def torch_linear_cross_entropy(i: Inputs) -> Outputs:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = F.linear_cross_entropy(
            i["hidden"],
            i["weight"],
            i["targets"],
            reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    if any("reference" in str(w.message) for w in caught):
        raise Absent(f"falls back to plain torch: {caught[0].message}")
    return {"logprobs": -loss}


def is_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def liger_linear_logprobs(i: Inputs) -> Outputs:
    """What Liger runs everywhere but on compute capability 9.0: chunks of rows in PyTorch."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    op = liger.LigerFusedLinearScaledCrossEntropyFunction.apply
    if is_hopper(i["hidden"]):
        chunked = liger._FusedLinearPPOFallbackFunction.apply
        nll, entropy = chunked(i["hidden"], i["weight"], i["targets"], 1.0, -100, True)
    else:
        nll, entropy = op(i["hidden"], i["weight"], i["targets"], 1.0, -100, 1, True)
    return {"logprobs": -nll, "entropy": entropy}


def liger_cute(i: Inputs) -> Outputs:
    """Its kernels for Hopper, which it imports there whether their compiler is installed or not."""
    if not is_hopper(i["hidden"]):
        raise Absent("Liger's CuTe kernels are for compute capability 9.0")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    try:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            i["hidden"], i["weight"], i["targets"], 1.0, -100, 1, True
        )
    except ImportError as error:
        raise Absent(
            f"Liger's CuTe kernels need nvidia-cutlass-dsl and apache-tvm-ffi: {error}"
        ) from error
    return {"logprobs": -nll, "entropy": entropy}


def cut_cross_entropy(i: Inputs) -> Outputs:
    needs_gpu(i["hidden"], "cut-cross-entropy (Triton)")
    from cut_cross_entropy import linear_cross_entropy

    return {
        "logprobs": -linear_cross_entropy(i["hidden"], i["weight"], i["targets"], reduction="none")
    }


def trl_without_datasets() -> None:
    """TRL's head needs `maybe_gather_lm_head_ctx` of a module that imports datasets and pandas. On
    one GPU it gathers nothing; where that module cannot be imported, this is all of it."""
    name = "trl.trainer.utils"
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:
        stand_in = types.ModuleType(name)
        stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore
        sys.modules[name] = stand_in


def trl_chunked_logprobs(i: Inputs) -> Outputs:
    """Triton on a GPU (TRL 1.16: trl/kernels/chunked_logprob.py), PyTorch on a CPU."""
    from trl.kernels import ChunkedLogProbFunction

    trl_without_datasets()
    picked, entropy, *_ = ChunkedLogProbFunction.apply(
        i["hidden"], i["weight"], None, i["targets"], 1.0, 8192, None, 1.0, ("entropy",)
    )
    return {"logprobs": picked, "entropy": entropy}


LINEAR_LOGPROBS = (
    Contender("gikernels", gikernels_linear_logprobs),
    Contender("torch", torch_linear_logprobs),
    Contender("torch.compile", compiled_linear_logprobs),
    Contender("torch linear_cross_entropy", torch_linear_cross_entropy, "entropy, KL, temperature"),
    Contender("Liger", liger_linear_logprobs, "KL, bias, softcap, temperature by row"),
    Contender("Liger CuTe", liger_cute, "KL, bias, softcap, temperature by row"),
    Contender("cut-cross-entropy", cut_cross_entropy, "entropy, KL, small gradients (filtered)"),
    Contender("TRL chunked", trl_chunked_logprobs, "KL, temperature by row"),
)


# --- from logits --------------------------------------------------------------------------------
# Liger's cross_entropy overwrites the logits, and its selective log-softmax skips the last row.


def gikernels_logprobs(i: Inputs) -> Outputs:
    return token_stats(ours("logprobs")(i["logits"], i["targets"]))


def torch_logprobs(i: Inputs) -> Outputs:
    return _stats(i["logits"], i["targets"])


def compiled_logprobs(i: Inputs) -> Outputs:
    return compiled(torch_logprobs, i["logits"])(i)


def torch_cross_entropy(i: Inputs) -> Outputs:
    return {"logprobs": -F.cross_entropy(i["logits"].float(), i["targets"], reduction="none")}


def trl_selective_log_softmax(i: Inputs) -> Outputs:
    if i["logits"].is_cuda:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    else:
        from trl.trainer.utils import selective_log_softmax_and_entropy

    picked, entropy = selective_log_softmax_and_entropy(i["logits"], i["targets"])
    return {"logprobs": picked, "entropy": entropy}


LOGPROBS = (
    Contender("gikernels", gikernels_logprobs),
    Contender("torch", torch_logprobs),
    Contender("torch.compile", compiled_logprobs),
    Contender("torch cross_entropy", torch_cross_entropy, "entropy, KL, temperature"),
    Contender("TRL", trl_selective_log_softmax, "KL, softcap, temperature by row"),
)


# --- policy loss --------------------------------------------------------------------------------

KL_COEF = 0.05


def gikernels_policy_loss(i: Inputs) -> Outputs:
    out = ours("linear_policy_loss")(
        i["hidden"],
        i["weight"],
        i["targets"],
        i["old_logprobs"],
        i["advantages"],
        mask=i["mask"],
        denom=i["denom"],
        ref_logprobs=i["ref_logprobs"],
        kl_coef=KL_COEF,
    )
    return {"loss": out.loss}


def policy_loss(logprobs: Tensor, i: Inputs) -> Outputs:
    from gikernels import reference

    out = reference.ppo_loss(
        logprobs, i["old_logprobs"], i["advantages"], i["mask"], denom=i["denom"]
    )
    kl = reference.kl_estimate(logprobs - i["ref_logprobs"], "k3")
    return {"loss": out.loss + KL_COEF * reference.token_sum(kl, i["mask"], i["denom"])}


def gikernels_two_ops(i: Inputs) -> Outputs:
    stats = ours("linear_logprobs")(i["hidden"], i["weight"], i["targets"])
    return policy_loss(stats.logprobs, i)


def torch_policy_loss(i: Inputs) -> Outputs:
    logp = F.linear(i["hidden"], i["weight"]).float().log_softmax(-1)
    return policy_loss(logp.gather(-1, i["targets"].unsqueeze(-1)).squeeze(-1), i)


def liger_policy_loss(i: Inputs) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    sequences = i["sequences"]
    op = LigerFusedLinearGRPOLoss(
        beta=KL_COEF, loss_type="dapo", compiled=i["hidden"].is_cuda, use_ref_model=True
    )

    def by_sequence(x: Tensor) -> Tensor:
        return x.view(sequences, -1, *x.shape[1:])

    loss, _ = op(
        by_sequence(i["hidden"]),
        i["weight"],
        by_sequence(i["targets"]),
        by_sequence(i["mask"].float()),
        by_sequence(i["advantages"])[:, 0].contiguous(),
        ref_per_token_logps=by_sequence(i["ref_logprobs"]),
        old_per_token_logps=by_sequence(i["old_logprobs"]),
        num_items_in_batch=i["denom"],
    )
    return {"loss": loss}


POLICY_LOSS = (
    Contender("gikernels", gikernels_policy_loss),
    Contender("gikernels, two ops", gikernels_two_ops),
    Contender("torch", torch_policy_loss),
    Contender("Liger", liger_policy_loss, "advantages by token, entropy bonus, dual clip, softcap"),
)


# --- advantages and groups: nobody else fuses them ----------------------------------------------

DICTIONARY_AT_MOST = 1 << 14  # values


def experience_of(experience: Callable[..., Any], i: Inputs) -> Outputs:
    out = experience(
        i["logprobs"],
        i["ref_logprobs"],
        i["values"],
        i["scores"],
        i["mask"],
        KL_COEF,
        norm="group",
        group_ids=i["group_ids"],
        num_groups=i["num_groups"],
    )
    return {"advantages": out.advantages, "returns": out.returns, "moments": out.moments}


def gikernels_experience(i: Inputs) -> Outputs:
    return experience_of(ours("experience"), i)


def torch_experience(i: Inputs) -> Outputs:
    """The specification: a loop over the steps, and statistics of all groups at once."""
    from gikernels import reference

    return experience_of(reference.experience, i)


def columns_experience(i: Inputs) -> Outputs:
    """The loop of verl and TRL: operations on one column a step, and a dictionary of groups."""
    out = baselines.experience_columns(
        i["logprobs"],
        i["ref_logprobs"],
        i["values"],
        i["scores"],
        i["mask"],
        KL_COEF,
        norm="group",
        group_ids=i["group_ids"],
    )
    return {"advantages": out.advantages, "returns": out.returns}


EXPERIENCE = (
    Contender("gikernels", gikernels_experience, forward_only=True),
    Contender("torch", torch_experience, forward_only=True),
    Contender("columns (verl, TRL)", columns_experience, "moments, NaN at masked places", True),
)


def gikernels_group_stats(i: Inputs) -> Outputs:
    return ours("group_stats")(i["values"], i["group_ids"], i["num_groups"])._asdict()


def torch_group_stats(i: Inputs) -> Outputs:
    """Two passes of index_add, in the dtype of the values."""
    values, ids, zeros = i["values"], i["group_ids"], i["values"].new_zeros(i["num_groups"])
    count = zeros.index_add(0, ids, torch.ones_like(values))
    mean = zeros.index_add(0, ids, values) / count.clamp(min=1)
    m2 = zeros.index_add(0, ids, (values - mean[ids]).square())
    return {"count": count, "mean": mean, "m2": m2}


GROUPS = (
    Contender("gikernels", gikernels_group_stats, forward_only=True),
    Contender("torch", torch_group_stats, forward_only=True),
)


def gikernels_group_advantages(i: Inputs) -> Outputs:
    advantages = ours("group_advantages")(i["values"], i["group_ids"], i["num_groups"])
    return {"advantages": advantages}


def torch_group_advantages(i: Inputs) -> Outputs:
    stats = torch_group_stats(i)
    ids, std = i["group_ids"], (stats["m2"] / (stats["count"] - 1).clamp(min=1)).sqrt()
    advantages = (i["values"] - stats["mean"][ids]) / (std[ids] + 1e-6)
    return {"advantages": advantages.masked_fill(stats["count"][ids] == 1, 0)}


def dictionary_group_advantages(i: Inputs) -> Outputs:
    if len(i["values"]) > DICTIONARY_AT_MOST:
        raise Absent("a Python loop over the values: half a minute a call on a GPU at 1048576")
    return {"advantages": baselines.group_advantages(i["values"], i["group_ids"])}


GROUP_ADVANTAGES = (
    Contender("gikernels", gikernels_group_advantages, forward_only=True),
    Contender("torch", torch_group_advantages, forward_only=True),
    Contender("dictionary (verl)", dictionary_group_advantages, "leave-one-out", True),
)


# --- the exact partition ------------------------------------------------------------------------


def between_variance(values: Tensor, ids: Tensor) -> Outputs:
    """What a partition is worth, in float64 from the groups that a contender found."""
    from gikernels import reference

    groups = reference.group_stats(
        values.double() - values.double().mean(), ids, int(ids.max()) + 1
    )
    return {"between_variance": (groups.count * groups.mean.square()).sum() / len(values)}


def gikernels_partition(i: Inputs) -> Outputs:
    ids = ours("partition")(i["values"], i["num_groups"]).group_ids
    return between_variance(i["values"], ids)


def kmeans1d_partition(i: Inputs) -> Outputs:
    import kmeans1d

    ids, _ = kmeans1d.cluster(i["values"].tolist(), i["num_groups"])
    return between_variance(i["values"], torch.tensor(ids, device=i["values"].device))


def jenkspy_partition(i: Inputs) -> Outputs:
    import jenkspy

    breaks = jenkspy.jenks_breaks(i["values"].cpu().numpy(), n_classes=i["num_groups"])
    inner = torch.tensor(breaks[1:-1], dtype=torch.float64, device=i["values"].device)
    return between_variance(i["values"], torch.bucketize(i["values"].double(), inner))


PARTITION = (
    Contender("gikernels", gikernels_partition, forward_only=True),
    Contender("kmeans1d", kmeans1d_partition, "weights, batches, GPU, minimum size", True),
    Contender("jenkspy", jenkspy_partition, "weights, batches, GPU, minimum size", True),
)
