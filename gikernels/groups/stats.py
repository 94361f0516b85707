"""Statistics of groups of sequences; what group-invariant learning makes of them (docs/math.md).

Read downward: custom operation, public functions. The Triton half is stats_triton.py, the C++ half
for the CPU stats_cpp.py; where there is no compiler the specification runs, two passes of PyTorch.
`soft_groups` and `group_weights` are a few products with a (S, M) matrix, M being two or three:
they stand in reference.py, and here their arguments are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gikernels import reference
from gikernels.backends import checks, dispatch
from gikernels.backends.symbols import bounds
from gikernels.reference import GroupStats, SoftGroups, stat_dtype

BACKENDS = ("triton", "cpp", "reference")
FORMS = ("mass", "uniform", "one_sided")


# --- custom operation ---------------------------------------------------------------------------


def _blank(values: Tensor, weights: Tensor | None, num_groups: int) -> GroupStats:
    def empty() -> Tensor:
        return values.new_empty(num_groups, dtype=stat_dtype(values, weights))

    return GroupStats(empty(), empty(), empty())


@torch.library.custom_op("gikernels::group_stats", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS)
def _group_stats_op(
    values: Tensor, group_ids: Tensor, num_groups: int, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = dispatch.choose(backend, values, BACKENDS)
    if chosen == "cpp":
        from gikernels.groups import stats_cpp

        stats = stats_cpp.group_stats(values, group_ids, num_groups, weights)
        if stats is not None:
            return stats
    # C++ looks at ids and weights on its way, and leaves it to these to say what is wrong.
    checks.ids_within("group_ids", group_ids, num_groups)
    if weights is not None and weights.device.type == "cpu":
        _check_weights(weights)
    if chosen == "triton":
        from gikernels.groups import stats_triton

        out = _blank(values, weights, num_groups)
        stats_triton.group_stats(values, group_ids, weights, out)
        return out
    return reference.group_stats(values, group_ids, num_groups, weights=weights)


def _check_weights(weights: Tensor) -> None:
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights: got a negative, infinite or NaN weight, want finite ones >= 0")


@_group_stats_op.register_fake
def _(values, group_ids, num_groups, weights, backend):
    return _blank(values, weights, num_groups)


def _constant(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise AssertionError("every output is a constant")


_group_stats_op.register_autograd(_no_gradient, setup_context=_constant)


# --- public functions ---------------------------------------------------------------------------


def group_stats(
    values: Tensor,  # (n)
    group_ids: Tensor,  # (n) integers
    num_groups: int,
    *,
    weights: Tensor | None = None,  # (n)
    backend: str = "auto",
) -> GroupStats:
    """Count (the sum of weights), mean and M2 of each group, as constants; zeros where empty.

        x, w = values[group_ids == g], weights[group_ids == g]
        count[g], mean[g] = w.sum(), (w * x).sum() / w.sum()
        m2[g] = (w * (x - mean[g]) ** 2).sum()

    Summed in float64 in a fixed order. Ids and weights are checked by value on the CPU; a GPU is
    not waited for: there a value with an id out of range belongs to no group.
    """
    checks.dims("values", checks.floats("values", values), 1, "(n)")
    checks.shape("group_ids", checks.ints("group_ids", group_ids), tuple(values.shape), "(n)")
    checks.whole("num_groups", num_groups, at_least=1)
    if weights is not None:
        checks.shape("weights", checks.floats("weights", weights), tuple(values.shape), "(n)")
    checks.same_device(values=values, group_ids=group_ids, weights=weights)
    return GroupStats(*_group_stats_op(values, group_ids, num_groups, weights, backend))


def merge_stats(a: GroupStats, b: GroupStats) -> GroupStats:
    """The statistics of the union of two disjoint samples, group by group (Chan); fields (G):

    count = a.count + b.count
    mean = (a.count * a.mean + b.count * b.mean) / count
    m2 = a.m2 + b.m2 + (b.mean - a.mean) ** 2 * a.count * b.count / count
    """
    for name, stats in (("a", a), ("b", b)):
        if not isinstance(stats, (tuple, list)) or len(stats) != 3:
            raise checks.wrong(name, stats, "GroupStats: count, mean and m2")
        for field, x in zip(GroupStats._fields, stats):
            checks.floats(f"{name}.{field}", x)
            checks.shape(f"{name}.{field}", x, tuple(a[0].shape), "that of a.count")
    return reference.merge_stats(GroupStats(*a), GroupStats(*b))


def group_advantages(
    rewards: Tensor,  # (S)
    group_ids: Tensor,  # (S) integers
    num_groups: int,
    *,
    baseline: str = "mean",  # or leave_one_out: the mean of the others
    scale: str = "std",  # or none
    eps: float = 1e-6,
) -> Tensor:
    """Advantages within groups, as GRPO and RLOO take them, constants:

        (rewards - baseline[group_ids]) / (std[group_ids] + eps)

    std is unbiased and of the whole group, with either baseline; a group of one gets 0.
    """
    checks.dims("rewards", checks.floats("rewards", rewards), 1, "(S)")
    checks.shape("group_ids", checks.ints("group_ids", group_ids), tuple(rewards.shape), "(S)")
    checks.whole("num_groups", num_groups, at_least=1)
    checks.one_of("baseline", baseline, ("mean", "leave_one_out"))
    checks.one_of("scale", scale, ("std", "none"))
    checks.number("eps", eps, at_least=0)
    r = rewards.detach().double()
    stats = group_stats(r, group_ids, num_groups)  # which also checks the ids
    ids = group_ids.long()
    count, mean, m2 = (x[ids] for x in stats)
    others = (count - 1).clamp(min=1)
    advantages = r - mean
    if baseline == "leave_one_out":  # R - mean of the others = (R - mean) n / (n - 1)
        advantages = advantages * count / others
    if scale == "std":
        advantages = advantages / ((m2 / others).sqrt() + eps)
    return advantages.masked_fill(count == 1, 0).to(stat_dtype(rewards))


def soft_groups(
    logits: Tensor,  # (S, M)
    returns: Tensor,  # (S)
    *,
    form: str = "mass",  # or uniform, one_sided: docs/math.md
    reduce: Callable[[Tensor], Tensor] | None = None,  # local sums -> their sum over ranks
) -> SoftGroups:
    """Soft membership, and how far apart the groups perform; differentiable:

        probs = logits.softmax(-1)
        mass = probs.mean(0)                                              # f_g
        group_returns = (probs * returns[:, None]).sum(0) / probs.sum(0)  # R_g
        variance = (mass * (group_returns - (mass * group_returns).sum()) ** 2).sum()

    With several ranks `reduce` takes a tensor of local sums and returns, in a new one, their sum
    over ranks; it is called once on every rank. All ranks then have the same mass, returns and
    variance, and each the gradient with respect to its own logits: the SUM of the ranks' parameter
    gradients, not the mean, is that of one rank with all sequences.
    """
    checks.dims("logits", checks.floats("logits", logits), 2, "(S, M)")
    _check_soft("logits", logits, returns, form, reduce)
    return reference.soft_groups(logits, returns, form=form, reduce=reduce)


def group_weights(
    probs: Tensor,  # (S, M), as from soft_groups
    returns: Tensor,  # (S)
    beta: float,
    *,
    form: str = "mass",
    clamp: tuple[float, float] = (0.0, 5.0),
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The weight of each sequence's policy gradient that asks for even groups:

        (1 - beta * probs @ (dVar/dR / mass)).clamp(*clamp)

    Constants (S). `reduce` as in `soft_groups`. Below 0 a sequence would be unlearned, so the
    default clamp starts there.
    """
    checks.dims("probs", checks.floats("probs", probs), 2, "(S, M)")
    _check_soft("probs", probs, returns, form, reduce)
    checks.number("beta", beta)
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise checks.wrong("clamp", clamp, "a pair (low, high)")
    low, high = clamp
    for x in clamp:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or x != x:
            raise checks.wrong("clamp", clamp, "two numbers")
    if low > high:
        raise checks.wrong("clamp", clamp, "low <= high")
    low, high = bounds(low, high, returns.device)
    return reference.group_weights(
        probs, returns, beta, form=form, clamp=(low, high), reduce=reduce
    )


def _check_soft(name: str, soft: Tensor, returns: Tensor, form: str, reduce: object) -> None:
    if soft.shape[1] == 0:
        raise checks.wrong(name, soft, "at least one group")
    checks.floats("returns", returns)
    checks.shape("returns", returns, tuple(soft.shape[:1]), "(S), one for each sequence")
    checks.one_of("form", form, FORMS)
    if reduce is not None and not callable(reduce):
        raise checks.wrong("reduce", reduce, "a function of a tensor, or None")
    checks.same_device(**{name: soft}, returns=returns)
