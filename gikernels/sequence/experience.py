"""KL penalties, GAE and normalised advantages: what lies between generation and the policy step.

The public functions and their checks. The custom operations are in experience_ops.py; docs/math.md
has the algebra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gikernels.backends import checks
from gikernels.backends.symbols import changing
from gikernels.reference import Experience, Gae, Support, TokenStats, kl_estimate, stat_dtype
from gikernels.sequence.experience_ops import experience_op, gae_op, normalize_op
from gikernels.vocabulary.linear_logprobs import linear_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = ("k1", "k2", "k3")
NORMS = ("none", "batch", "group")


def kl_penalty(
    logprobs: Tensor,  # (S, T) or (N)
    ref_logprobs: Tensor,  # like logprobs
    coef: float | Tensor,  # a number, or (G)
    group_ids: Tensor | None = None,  # (S) for (S, T), (N) for flat rows
    *,
    estimator: str = "k1",
) -> Tensor:
    """The cost of leaving the reference policy, token by token; d = logprobs - ref_logprobs:

        coef[group_ids] * {"k1": d, "k2": d ** 2 / 2, "k3": exp(-d) - 1 + d}[estimator]

    Gradients reach all three, so it serves as a loss term too. `experience` has it built in. Ids
    out of range raise on the CPU and under torch's own device-side check on a GPU.
    """
    checks.floats("logprobs", logprobs)
    checks.floats("ref_logprobs", ref_logprobs)
    checks.shape("ref_logprobs", ref_logprobs, tuple(logprobs.shape), "that of logprobs")
    checks.one_of("estimator", estimator, ESTIMATORS)
    checks.same_device(logprobs=logprobs, ref_logprobs=ref_logprobs, group_ids=group_ids)
    dtype = stat_dtype(logprobs, ref_logprobs)
    if group_ids is None:
        if isinstance(coef, Tensor):
            raise checks.wrong("group_ids", None, "the group of each sequence, as coef is a tensor")
        checks.number("coef", coef)
    else:
        coef = checks.dims("coef", checks.floats("coef", coef), 1, "(G), picked by group_ids")
        checks.ints("group_ids", group_ids)
        checks.shape("group_ids", group_ids, tuple(logprobs.shape[:1]), "one for each row")
        if not torch.compiler.is_compiling():
            checks.ids_within("group_ids", group_ids, coef.shape[0])
        coef = coef.to(dtype)[group_ids.long()]
        coef = coef.view(-1, *(1,) * (logprobs.dim() - 1))
    return coef * kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)


def gae(
    rewards: Tensor,  # (S, T)
    values: Tensor,  # (S, T)
    mask: Tensor,  # (S, T) bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # (S), the value after the last step; 0 when None
    backend: str = "auto",
) -> Gae:
    """Generalised advantage estimation over the unmasked steps, as if the others were not there.

        for t in reversed(range(T)):
            delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
            advantages[:, t] = delta + gamma * lam * advantages[:, t + 1]
        returns = advantages + values

    Masked outputs are 0. Both are constants to autograd.
    """
    checks.dims("rewards", checks.floats("rewards", rewards), 2, "(S, T)")
    _tokens_like(rewards, values=values)
    _check_mask(mask, rewards)
    if last_values is not None:
        checks.floats("last_values", last_values)
        checks.shape("last_values", last_values, (rewards.shape[0],), "one for each sequence")
    _check_decay(gamma, lam)
    checks.same_device(rewards=rewards, values=values, mask=mask, last_values=last_values)
    carried, (gamma, lam) = changing(float(gamma), float(lam))
    return Gae(*gae_op(rewards, values, mask, last_values, gamma, lam, backend, carried))


def experience(
    logprobs: Tensor,  # (S, T)
    ref_logprobs: Tensor,  # (S, T)
    values: Tensor | None,  # (S, T), or None: no critic
    scores: Tensor,  # (S)
    mask: Tensor,  # (S, T) bool
    kl_coef: float | Tensor,  # a number, or (S)
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",
    norm: str = "none",  # none, batch or group
    group_ids: Tensor | None = None,  # (S)
    num_groups: int | None = None,
    eps: float = 1e-8,
    apply_norm: bool = True,
    exact_kl: Tensor | None = None,  # (S, T): replaces the estimate from the two log-probs
    backend: str = "auto",
) -> Experience:
    """Penalised rewards, advantages, returns and their moments in one launch.

        rewards = -kl_penalty(logprobs, ref_logprobs, kl_coef, estimator=estimator)
        rewards[i, last unmasked step] += scores[i]
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        mean, var = moments of the advantages of the batch, or of each sequence's group
        advantages = (advantages - mean) / sqrt(var + eps)

    Without a critic every token gets its sequence's summed reward. `norm` uses the population
    variance over unmasked tokens. With several ranks: `apply_norm=False`, merge the moments, then
    `normalize_advantages`. All outputs are constants to autograd. A group id out of range raises
    on the CPU; on a GPU, which is not waited for, the advantages of its sequence become NaN.
    """
    checks.dims("logprobs", checks.floats("logprobs", logprobs), 2, "(S, T)")
    _check_mask(mask, logprobs)
    checks.one_of("estimator", estimator, ESTIMATORS)
    return _experience(
        logprobs,
        ref_logprobs,
        values,
        scores,
        mask,
        kl_coef,
        gamma=gamma,
        lam=lam,
        estimator=estimator,
        norm=norm,
        group_ids=group_ids,
        num_groups=num_groups,
        eps=eps,
        apply_norm=apply_norm,
        exact_kl=exact_kl,
        backend=backend,
    )


def _experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    kept: Tensor,
    kl_coef: float | Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float,
    lam: float,
    estimator: str,
    norm: str,
    group_ids: Tensor | None,
    num_groups: int | None,
    eps: float,
    apply_norm: bool,
    exact_kl: Tensor | None,
    ignore_index: int = -100,
    backend: str,
) -> Experience:
    """What `experience` and `linear_experience` share: the checks of their common arguments."""
    _tokens_like(logprobs, ref_logprobs=ref_logprobs, values=values, exact_kl=exact_kl)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checks.floats("scores", scores)
    checks.shape("scores", scores, (sequences,), "(S), one for each sequence")
    if isinstance(kl_coef, Tensor):
        checks.floats("kl_coef", kl_coef)
        checks.shape("kl_coef", kl_coef, (sequences,), "(S), one for each sequence, or a number")
    else:
        checks.number("kl_coef", kl_coef)
    checks.number("eps", eps, at_least=0)
    _check_decay(gamma, lam)
    checks.one_of("norm", norm, NORMS)
    if norm == "group" and group_ids is None:
        raise checks.wrong("group_ids", None, "an integer tensor (S), as norm is 'group'")
    if norm == "group" or num_groups is not None:
        checks.whole("num_groups", num_groups, at_least=1)
    if group_ids is not None:
        checks.ints("group_ids", group_ids)
        checks.shape("group_ids", group_ids, (sequences,), "(S), one for each sequence")
    checks.same_device(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        mask=kept,
        kl_coef=kl_coef if isinstance(kl_coef, Tensor) else None,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids,
        exact_kl=exact_kl,
    )
    by_group = norm == "group"
    number = 0.0 if isinstance(kl_coef, Tensor) else float(kl_coef)
    carried, (number, gamma, lam, eps) = changing(number, float(gamma), float(lam), float(eps))
    outputs = experience_op(
        logprobs,
        ref_logprobs,
        values,
        scores,
        kept,
        kl_coefs=kl_coef if isinstance(kl_coef, Tensor) else None,
        kl_coef=number,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids if by_group else None,
        exact_kl=exact_kl,
        num_groups=num_groups if by_group else 1,
        gamma=gamma,
        lam=lam,
        estimator=estimator,
        norm=norm,
        eps=eps,
        apply_norm=bool(apply_norm),
        ignore_index=ignore_index,
        backend=backend,
        carried=carried,
    )
    return Experience(*outputs)


def linear_experience(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N)
    cu_seqlens: Tensor,  # (S + 1), rises from 0 to N
    ref_logprobs: Tensor,  # (N)
    values: Tensor | None,  # (N), or None: no critic
    scores: Tensor,  # (S)
    kl_coef: float | Tensor,  # a number, or (S)
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    support: Support | None = None,
    vocab_group: ProcessGroup | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",  # or k2, k3, exact
    norm: str = "none",
    group_ids: Tensor | None = None,  # (S)
    num_groups: int | None = None,
    eps: float = 1e-8,
    apply_norm: bool = True,
    backend: str = "auto",
) -> tuple[TokenStats, Experience]:
    """From hidden states to advantages in two launches, on packed sequences without padding:

        stats = linear_logprobs(hidden, weight, targets, temperature, ...)
        return stats, experience(pad(stats.logprobs), pad(ref_logprobs), pad(values), scores,
                                 pad(targets != ignore_index), kl_coef, ...)       # unpadded again

    Keywords mean what they mean in those two. Estimator "exact" takes the KL over the whole
    vocabulary, which needs `ref`. Ignored rows are masked steps; sequences may be empty. The
    statistics keep their gradient, the experience is constant.
    """
    checks.dims("hidden", checks.floats("hidden", hidden), 2, "(N, D)")
    checks.shape("targets", checks.ints("targets", targets), (hidden.shape[0],), "(N), one a row")
    checks.dims("cu_seqlens", checks.ints("cu_seqlens", cu_seqlens), 1, "(S + 1)")
    if cu_seqlens.shape[0] == 0:
        raise checks.wrong("cu_seqlens", cu_seqlens, "(S + 1), a 0 at least")
    checks.one_of("estimator", estimator, (*ESTIMATORS, "exact"))
    if estimator == "exact" and ref is None:
        raise ValueError("ref: got None, want (ref_hidden, ref_weight), as estimator is 'exact'")
    stats = linear_logprobs(
        hidden,
        weight,
        targets,
        temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ref=ref,
        ignore_index=ignore_index,
        support=support,
        vocab_group=vocab_group,
        backend=backend,
    )
    exact_kl = stats.kl.detach() if estimator == "exact" and stats.kl is not None else None
    return stats, _experience(
        stats.logprobs.detach(),
        ref_logprobs,
        values,
        scores,
        targets,
        kl_coef,
        cu_seqlens=cu_seqlens,
        gamma=gamma,
        lam=lam,
        estimator=estimator,
        norm=norm,
        group_ids=group_ids,
        num_groups=num_groups,
        eps=eps,
        apply_norm=apply_norm,
        exact_kl=exact_kl,
        ignore_index=ignore_index,
        backend=backend,
    )


def normalize_advantages(
    advantages: Tensor,  # (S, T) or (N)
    mask: Tensor,  # like advantages, bool
    moments: Tensor,  # (G, 3): count, mean, M2, merged over ranks
    group_ids: Tensor | None = None,  # (S) for (S, T), (N) for flat rows; None: one group
    *,
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """The last step of `experience(..., apply_norm=False)`, once the moments of all ranks are one.

    count, mean, m2 = moments[group_ids].unbind(-1)
    (advantages - mean) / sqrt(m2 / count + eps)
    """
    checks.floats("advantages", advantages)
    if advantages.dim() not in (1, 2):
        raise checks.wrong("advantages", advantages, "(S, T) or (N)")
    _check_mask(mask, advantages)
    checks.dims("moments", checks.floats("moments", moments), 2, "(G, 3)")
    groups = moments.shape[0] if group_ids is not None else 1
    checks.shape("moments", moments, (groups, 3), "count, mean and M2 of each group")
    if group_ids is not None:
        checks.ints("group_ids", group_ids)
        checks.shape("group_ids", group_ids, tuple(advantages.shape[:1]), "one for each row")
    checks.number("eps", eps, at_least=0)
    checks.same_device(advantages=advantages, mask=mask, moments=moments, group_ids=group_ids)
    carried, (eps,) = changing(float(eps))
    return normalize_op(advantages, mask, moments, group_ids, eps, backend, carried)


def _tokens_like(first: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None:
            checks.shape(name, checks.floats(name, x), tuple(first.shape), "one for each token")


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    checks.shape("mask", checks.bools("mask", mask), tuple(tokens.shape), "one for each token")


def _check_decay(gamma: float, lam: float) -> None:
    checks.number("gamma", gamma, at_least=0, at_most=1)
    checks.number("lam", lam, at_least=0, at_most=1)
