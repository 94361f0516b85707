"""Every operation of gikernels in plain PyTorch: the executable specification. Read this first.

Nothing here is fast or lean. Each function says in the fewest lines what the fused operation of the
same name must return, in the precision of its inputs (float64 in, float64 out), so that tests,
benchmarks and documents all compare with the same text. Arguments are assumed to be valid; the
public functions check them.

Shapes: S sequences, T padded steps, N rows (flat tokens), D hidden, V vocabulary, G groups,
M soft groups, P pairs. `mask` is bool and True where a token counts. What lies where mask is
False (or where a target is `ignore_index`) never reaches a result or a gradient, NaN included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# --- what the operations return -----------------------------------------------------------------


class TokenStats(NamedTuple):
    """Per-token statistics, each of the shape of `targets`; `kl` is None without a reference."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None


class Support(NamedTuple):
    """Row i could only be sampled from ids[offsets[i] : offsets[i + 1]]: top-p, top-k, a grammar.

    A row without ids could be sampled from the whole vocabulary.
    """

    offsets: Tensor  # (N + 1) int64, rises from 0 to nnz
    ids: Tensor  # (nnz) integers in [0, V), different within a row


class LossOut(NamedTuple):
    """A scalar loss, and detached 0-d metrics that add over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Gae(NamedTuple):
    advantages: Tensor  # (S, T)
    returns: Tensor  # (S, T)


class Experience(NamedTuple):
    """What PPO trains on; token tensors are (S, T), or (N) from `linear_experience`."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    seq_kl: Tensor  # (S)
    moments: Tensor  # (G, 3): count, mean, M2 of the advantages before normalisation


class GroupStats(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (G), the sum of weights
    mean: Tensor  # (G)
    m2: Tensor  # (G), the weighted sum of squared deviations


class Partition(NamedTuple):
    """Fields carry a leading batch dimension where `values` did."""

    group_ids: Tensor  # (n) int32, 0 has the lowest values
    thresholds: Tensor  # (K - 1) midpoints between neighbouring groups
    centers: Tensor  # (K) group means
    between_variance: Tensor  # ()


class SoftGroups(NamedTuple):
    probs: Tensor  # (S, M)
    mass: Tensor  # (M)
    returns: Tensor  # (M)
    variance: Tensor  # ()


# --- precision and masks ------------------------------------------------------------------------


def stat_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Statistics are fp32, whatever the inputs; only float64 inputs keep float64."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where mask is False. Multiplication would let NaN through; this does not."""
    return x.masked_fill(~mask, 0)


# --- the vocabulary: log-probabilities, entropy, KL ---------------------------------------------


def transform_logits(
    z: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Scale first, then softcap, then temperature: the order of Gemma and Cohere heads."""
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature


def kept_tokens(support: Support, vocab: int) -> Tensor:
    """(N, V) bool: what each row could be sampled from."""
    lengths = support.offsets.diff()
    keep = (lengths == 0).unsqueeze(1).repeat(1, vocab)
    rows = torch.arange(len(lengths), device=keep.device).repeat_interleave(lengths)
    keep[rows, support.ids.long()] = True
    return keep


def stats_of_logits(z: Tensor, targets: Tensor, ref_z: Tensor | None) -> TokenStats:
    """Log-probability of the target, entropy, and exact KL(pi || ref), of final logits (..., V).

    A logit of -inf is a token that cannot be drawn: it adds nothing to the entropy or the KL.
    """
    logp = z.log_softmax(-1)
    p = logp.exp()
    logprobs = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(p * logp.masked_fill(z == -torch.inf, 0)).sum(-1)
    if ref_z is None:
        return TokenStats(logprobs, entropy, None)
    log_ratio = (logp - ref_z.log_softmax(-1)).masked_fill(z == -torch.inf, 0)
    return TokenStats(logprobs, entropy, (p * log_ratio).sum(-1))


def logprobs(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logits: Tensor | None = None,  # (..., V), no gradient
    ignore_index: int = -100,
    support: Support | None = None,  # of the rows in order
) -> TokenStats:
    """With a support, of the distribution renormalised over each row's kept tokens."""
    dtype = stat_dtype(logits)
    kept = targets != ignore_index
    targets = masked(targets, kept)
    if isinstance(temperature, Tensor):
        temperature = temperature.masked_fill(~kept, 1)

    def final(z: Tensor) -> Tensor:
        z = masked(z, kept.unsqueeze(-1)).to(dtype)
        z = transform_logits(z, temperature, softcap=softcap, logit_scale=logit_scale)
        return z if keep is None else z.masked_fill(~keep, -torch.inf)

    keep = None if support is None else kept_tokens(support, logits.shape[-1]).view(logits.shape)
    ref_z = None if ref_logits is None else final(ref_logits.detach())
    stats = stats_of_logits(final(logits), targets, ref_z)
    if keep is not None:  # a target that was not kept: -inf, and no gradient
        outside = ~keep.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        stats = stats._replace(logprobs=stats.logprobs.masked_fill(outside, -torch.inf))
    kl = None if stats.kl is None else masked(stats.kl, kept)
    return TokenStats(masked(stats.logprobs, kept), masked(stats.entropy, kept), kl)


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    temperature: float | Tensor = 1.0,  # () or (...)
    *,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref: tuple[Tensor, Tensor] | None = None,  # (..., D'), (V, D'), no gradient, no bias
    ignore_index: int = -100,
    support: Support | None = None,  # of the rows in order
) -> TokenStats:
    dtype = stat_dtype(hidden, weight)
    kept = targets != ignore_index
    z = F.linear(
        masked(hidden, kept.unsqueeze(-1)).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    ref_z = None
    if ref is not None:
        ref_hidden, ref_weight = ref[0].detach(), ref[1].detach()
        ref_z = masked(ref_hidden, kept.unsqueeze(-1)).to(dtype) @ ref_weight.to(dtype).T
    return logprobs(
        z,
        targets,
        temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ref_logits=ref_z,
        ignore_index=ignore_index,
        support=support,
    )


def linear_gather_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K); -1: none
    temperature: float | Tensor = 1.0,  # () or (N)
    *,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probabilities (N, K) of K given tokens a row; 0 where there is none."""
    given = ids >= 0
    logp = log_softmax_of(
        hidden, weight, given.any(1), temperature, bias, softcap=softcap, logit_scale=logit_scale
    )
    return masked(logp.gather(1, masked(ids, given).long()), given)


def linear_divergence(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref: tuple[Tensor, Tensor],  # (N, D'), (V, D'), no gradient, no bias
    *,
    kind: str = "reverse",
    mix: float = 0.5,
    mask: Tensor,  # (N) bool
    denom: float | Tensor,  # the GLOBAL number of tokens; or (N): each token's own
    temperature: float | Tensor = 1.0,  # () or (N)
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> LossOut:
    """KL(pi, ref), KL(ref, pi), or mix KL(pi, m) + (1 - mix) KL(ref, m) with m = mix pi +
    (1 - mix) ref."""

    def log_probs(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return log_softmax_of(x, w, mask, temperature, b, softcap=softcap, logit_scale=logit_scale)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b).masked_fill(a == -torch.inf, 0)).sum(-1)

    log_p, log_q = (
        log_probs(hidden, weight, bias),
        log_probs(ref[0].detach(), ref[1].detach(), None),
    )
    if kind == "reverse":
        divergence = kl(log_p, log_q)
    elif kind == "forward":
        divergence = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))
        divergence = mix * kl(log_p, log_m) + (1 - mix) * kl(log_q, log_m)
    loss = token_sum(divergence, mask, denom)
    return LossOut(loss, {"divergence": loss.detach()})


def log_softmax_of(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    kept: Tensor,  # (N) bool: rows that count
    temperature: float | Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:  # (N, V)
    dtype = stat_dtype(hidden, weight)
    if isinstance(temperature, Tensor):
        temperature = temperature.masked_fill(~kept, 1)
    z = F.linear(
        masked(hidden, kept.unsqueeze(-1)).to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )
    z = transform_logits(z, temperature, softcap=softcap, logit_scale=logit_scale)
    return z.log_softmax(-1)


# --- KL penalty, advantages, experience ---------------------------------------------------------


def kl_estimate(d: Tensor, estimator: str) -> Tensor:
    """Estimators of KL(pi || ref) at a sampled token from d = log pi - log ref."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d  # k3


def kl_penalty(
    logprobs: Tensor,  # (S, T) or (N)
    ref_logprobs: Tensor,
    coef: float | Tensor,  # a number, or (G)
    group_ids: Tensor | None = None,  # (S) or (N)
    *,
    estimator: str = "k1",
) -> Tensor:
    """+ coef * KL: a cost."""
    dtype = stat_dtype(logprobs, ref_logprobs)
    kl = kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)
    if group_ids is not None:
        assert isinstance(coef, Tensor)
        coef = coef.to(dtype)[group_ids.long()]
        coef = coef.view(coef.shape + (1,) * (kl.dim() - coef.dim()))
    return coef * kl


def gae(
    rewards: Tensor,  # (S, T)
    values: Tensor,  # (S, T)
    mask: Tensor,  # (S, T) bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # (S), the value after the last step; 0 when None
) -> Gae:
    """Generalised advantage estimation over the unmasked steps, as if the others were not there."""
    dtype = stat_dtype(rewards, values)
    rewards, values = masked(rewards, mask).to(dtype), masked(values, mask).to(dtype)
    next_adv = rewards.new_zeros(rewards.shape[0])
    next_value = next_adv if last_values is None else last_values.to(dtype)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        adv = delta + gamma * lam * next_adv
        next_adv = torch.where(mask[:, t], adv, next_adv)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(masked(adv, mask[:, t]))
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(rewards)
    return Gae(advantages, masked(advantages + values, mask))


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
    norm: str = "none",
    group_ids: Tensor | None = None,  # (S)
    num_groups: int | None = None,
    eps: float = 1e-8,
    apply_norm: bool = True,
    exact_kl: Tensor | None = None,  # (S, T): replaces the estimate from the two log-probs
) -> Experience:
    """Penalised rewards, advantages and returns. Constants to autograd: PPO differentiates none.

    `apply_norm=False` still returns the moments, so that ranks can merge them and normalise with
    `normalize_advantages`.
    """
    dtype = stat_dtype(logprobs, ref_logprobs, values, scores)
    logprobs, ref_logprobs, scores = (x.detach() for x in (logprobs, ref_logprobs, scores))
    if exact_kl is None:
        d = masked(logprobs, mask).to(dtype) - masked(ref_logprobs, mask).to(dtype)
        kl = masked(kl_estimate(d, estimator), mask)
    else:
        kl = masked(exact_kl.detach(), mask).to(dtype)
    coef = kl_coef.detach().to(dtype).unsqueeze(1) if isinstance(kl_coef, Tensor) else kl_coef
    # The last unmasked step is the one with no unmasked step at or after the next.
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    rewards = masked(-coef * kl, mask) + masked(scores.to(dtype).unsqueeze(1), last)
    if values is None:
        total = masked(rewards.sum(1, keepdim=True).expand_as(rewards), mask)
        advantages = returns = total
    else:
        advantages, returns = gae(rewards, values.detach(), mask, gamma=gamma, lam=lam)
    if norm == "none":
        moments = rewards.new_zeros(1, 3)
    else:
        if norm == "batch":
            group_ids, num_groups = torch.zeros_like(scores, dtype=torch.long), 1
        assert group_ids is not None and num_groups is not None
        token_ids = group_ids.long().unsqueeze(1).expand_as(mask)[mask]
        moments = torch.stack(group_stats(advantages[mask], token_ids, num_groups), -1)
        if apply_norm:
            advantages = normalize_advantages(advantages, mask, moments, group_ids, eps=eps)
    return Experience(rewards, kl, advantages, returns.clone(), kl.sum(1), moments)


def normalize_advantages(
    advantages: Tensor,  # (S, T)
    mask: Tensor,  # (S, T) bool
    moments: Tensor,  # (G, 3): count, mean, M2, possibly merged over ranks
    group_ids: Tensor | None = None,  # (S); None: one group
    *,
    eps: float = 1e-8,
) -> Tensor:
    """(A - mean) / sqrt(var + eps) with the population variance of the sequence's group."""
    count, mean, m2 = moments.unbind(-1)
    scale = torch.rsqrt(m2 / count.clamp(min=1) + eps)
    if group_ids is None:
        group_ids = torch.zeros(advantages.shape[0], dtype=torch.long, device=advantages.device)
    ids = group_ids.long()
    return masked((advantages - mean[ids].unsqueeze(1)) * scale[ids].unsqueeze(1), mask)


def linear_experience(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N)
    cu_seqlens: Tensor,  # (S + 1), rises from 0 to N
    ref_logprobs: Tensor,  # (N)
    values: Tensor | None,  # (N)
    scores: Tensor,  # (S)
    kl_coef: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    support: Support | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",
    norm: str = "none",
    group_ids: Tensor | None = None,  # (S)
    num_groups: int | None = None,
    eps: float = 1e-8,
    apply_norm: bool = True,
) -> tuple[TokenStats, Experience]:
    """`linear_logprobs`, then `experience`, on packed sequences; ignored rows are masked steps."""
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
    )
    lengths = cu_seqlens.diff()
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=hidden.device)
    within = steps < lengths.unsqueeze(1)  # (S, T): where the flat rows go, in order

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(within.shape).masked_scatter(within, x)

    out = experience(
        pad(stats.logprobs.detach()),
        pad(ref_logprobs.to(stats.logprobs.dtype)),
        None if values is None else pad(values),
        scores,
        pad(targets != ignore_index),
        kl_coef,
        gamma=gamma,
        lam=lam,
        estimator=estimator,
        norm=norm,
        group_ids=group_ids,
        num_groups=num_groups,
        eps=eps,
        apply_norm=apply_norm,
        exact_kl=pad(stats.kl.detach()) if estimator == "exact" and stats.kl is not None else None,
    )
    return stats, out._replace(
        rewards=out.rewards[within],
        kl=out.kl[within],
        advantages=out.advantages[within],
        returns=out.returns[within],
    )


# --- losses -------------------------------------------------------------------------------------


def ppo_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO-clip loss, ratio, and whether the clip is in force (so no gradient), for each token."""
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -ratio * advantages
    loss = torch.maximum(plain, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:  # arXiv 1912.09729: bounds the loss of a large ratio where A < 0
        bounded = torch.minimum(loss, -dual_clip * advantages)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss, ratio, loss != plain


def cispo_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cap_low: float, cap_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO loss, ratio, and whether a cap holds the token's weight, for each token."""
    ratio = torch.exp(logprobs - old_logprobs)
    weight = ratio.detach().clamp(cap_low, cap_high)
    return -weight * advantages * logprobs, ratio, weight != ratio


def token_sum(x: Tensor, mask: Tensor, denom: float | Tensor) -> Tensor:
    """sum(x / denom) over the mask; denom is one number, or each token's own."""
    if isinstance(denom, Tensor) and denom.dim():
        return (masked(x, mask) / denom.masked_fill(~mask, 1)).sum()
    return masked(x, mask).sum() / denom


def ppo_loss(
    logprobs: Tensor,  # any shape
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens; or like mask: each token's own
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOut:
    logprobs, old_logprobs, advantages = _rows_of(mask, logprobs, old_logprobs, advantages)
    loss, ratio, clipped = ppo_terms(
        logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip
    )
    return _policy_out(loss, ratio, clipped, old_logprobs - logprobs, mask, denom)


def cispo_loss(
    logprobs: Tensor,  # any shape
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # as for ppo_loss
    cap_low: float = 0.0,
    cap_high: float = 5.0,
) -> LossOut:
    """arXiv 2506.13585: no token is dropped, its weight in REINFORCE is capped instead."""
    logprobs, old_logprobs, advantages = _rows_of(mask, logprobs, old_logprobs, advantages)
    loss, ratio, capped = cispo_terms(logprobs, old_logprobs, advantages, cap_low, cap_high)
    return _policy_out(loss, ratio, capped, old_logprobs - logprobs, mask, denom)


def gspo_loss(
    logprobs: Tensor,  # (S, T)
    old_logprobs: Tensor,  # (S, T)
    advantages: Tensor,  # (S)
    mask: Tensor,  # (S, T) bool
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    denom: float | Tensor | None = None,  # the GLOBAL number of sequences; None: those with a token
) -> LossOut:
    """arXiv 2507.18071: PPO's clip for one ratio a sequence, the geometric mean of its tokens'."""
    logprobs, old_logprobs = _rows_of(mask, logprobs, old_logprobs)
    some, count = mask.any(1), mask.sum(1).clamp(min=1)
    log_ratio = (logprobs - old_logprobs).sum(1) / count
    advantages = masked(advantages.detach(), some).to(logprobs.dtype)
    loss, ratio, clipped = ppo_terms(
        log_ratio, torch.zeros_like(log_ratio), advantages, clip_low, clip_high, None
    )
    denom = some.sum().clamp(min=1) if denom is None else denom
    return _policy_out(loss, ratio, clipped, -log_ratio, some, denom)


def _rows_of(mask: Tensor, logprobs: Tensor, *others: Tensor) -> list[Tensor]:
    """In the precision of the statistics, zeros where masked; a gradient for the first alone."""
    dtype = stat_dtype(logprobs)
    return [masked(x, mask).to(dtype) for x in (logprobs, *(x.detach() for x in others))]


def _policy_out(
    loss: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    back: Tensor,  # old less new log-probability: its k3 estimates KL(old, new)
    mask: Tensor,
    denom: float | Tensor,
) -> LossOut:
    with torch.no_grad():
        metrics = {
            "ratio": token_sum(ratio, mask, denom),
            "clipfrac": token_sum(clipped.to(ratio.dtype), mask, denom),
            "approxkl": token_sum(kl_estimate(back, "k3"), mask, denom),
        }
    return LossOut(token_sum(loss, mask, denom), metrics)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens
    clip: float | None = 0.2,
) -> LossOut:
    """0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old value."""
    dtype = stat_dtype(values)
    values, old_values, returns = (
        masked(x, mask).to(dtype) for x in (values, old_values.detach(), returns.detach())
    )
    plain = (values - returns).square()
    loss = plain
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(plain, (clipped - returns).square())
    with torch.no_grad():
        metrics = {
            "clipfrac": token_sum((loss > plain).to(dtype), mask, denom),
            "error": token_sum(plain, mask, denom),
        }
    return LossOut(0.5 * token_sum(loss, mask, denom), metrics)


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N)
    old_logprobs: Tensor,  # (N)
    advantages: Tensor,  # (N)
    *,
    mask: Tensor,  # (N) bool
    denom: float | Tensor,  # the GLOBAL number of tokens; or (N): each token's own
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cap_low: float = 0.0,  # for loss "cispo"
    cap_high: float = 5.0,
    ref_logprobs: Tensor | None = None,  # (N)
    kl_coef: float | Tensor = 0.0,  # a number, or (N)
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Support | None = None,
) -> LossOut:
    """sum(policy + kl_coef * kl - entropy_coef * entropy) / denom over the mask."""
    stats = linear_logprobs(
        hidden,
        weight,
        targets.masked_fill(~mask, -100),
        temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
    )
    return policy_loss_of(
        stats,
        old_logprobs,
        advantages,
        mask=mask,
        denom=denom,
        loss=loss,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        cap_low=cap_low,
        cap_high=cap_high,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
    )


def policy_loss_of(
    stats: TokenStats,
    old_logprobs: Tensor,  # (N)
    advantages: Tensor,  # (N)
    *,
    mask: Tensor,  # (N) bool
    denom: float | Tensor,
    loss: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    cap_low: float,
    cap_high: float,
    ref_logprobs: Tensor | None,  # (N)
    kl_coef: float | Tensor,
    kl_estimator: str,
    entropy_coef: float,
) -> LossOut:
    """The same from the statistics of the tokens."""
    of_tokens = (stats.logprobs, old_logprobs, advantages, mask)
    if loss == "cispo":
        policy, metrics = cispo_loss(*of_tokens, denom=denom, cap_low=cap_low, cap_high=cap_high)
    else:
        policy, metrics = ppo_loss(
            *of_tokens, denom=denom, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
        )
    entropy = token_sum(stats.entropy, mask, denom)
    metrics = {"policy": policy.detach(), **metrics, "entropy": entropy.detach()}
    total = policy - entropy_coef * entropy
    if ref_logprobs is not None:
        d = stats.logprobs - masked(ref_logprobs.detach(), mask).to(stats.logprobs.dtype)
        kl = kl_estimate(d, kl_estimator)
        metrics["kl"] = token_sum(kl, mask, denom).detach()
        coef = masked(kl_coef.detach(), mask) if isinstance(kl_coef, Tensor) else kl_coef
        total = total + token_sum(coef * kl, mask, denom)
    return LossOut(total, metrics)


# --- groups -------------------------------------------------------------------------------------


def group_stats(
    values: Tensor,  # (n)
    group_ids: Tensor,  # (n)
    num_groups: int,
    *,
    weights: Tensor | None = None,  # (n)
) -> GroupStats:
    """Count, mean and M2 of each group, in two passes in float64; an empty group is all zeros."""
    x, ids = values.detach().double(), group_ids.long()
    w = torch.ones_like(x) if weights is None else weights.detach().double()
    zeros = x.new_zeros(num_groups)
    count = zeros.index_add(0, ids, w)
    safe = torch.where(count > 0, count, 1)
    mean = zeros.index_add(0, ids, w * x) / safe
    m2 = zeros.index_add(0, ids, w * (x - mean[ids]).square())
    dtype = stat_dtype(values, weights)
    return GroupStats(count.to(dtype), mean.to(dtype), m2.to(dtype))


def merge_stats(a: GroupStats, b: GroupStats) -> GroupStats:
    """The statistics of both halves together (Chan): exact where sums of squares would cancel."""
    count = a.count + b.count
    share = b.count / torch.where(count > 0, count, 1)
    delta = b.mean - a.mean
    mean = torch.where(a.count > 0, a.mean + delta * share, b.mean)
    m2 = a.m2 + b.m2 + delta.square() * a.count * share
    return GroupStats(count, mean, m2)


def group_advantages(
    rewards: Tensor,  # (S)
    group_ids: Tensor,  # (S)
    num_groups: int,
    *,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-6,
) -> Tensor:
    """(R - baseline) / (std + eps) within each group; std is unbiased, a singleton gets 0."""
    r, ids = rewards.detach().double(), group_ids.long()
    count, mean, m2 = (x.double()[ids] for x in group_stats(r, ids, num_groups))
    advantages = r - mean
    if baseline == "leave_one_out":  # R_i - mean of the others = (R_i - mean) n / (n - 1)
        advantages = advantages * count / (count - 1).clamp(min=1)
    if scale == "std":
        advantages = advantages / ((m2 / (count - 1).clamp(min=1)).sqrt() + eps)
    return advantages.masked_fill(count == 1, 0).to(stat_dtype(rewards))


def partition(
    values: Tensor,  # (n) or (B, n)
    num_groups: int = 2,
    *,
    weights: Tensor | None = None,  # like values
    min_size: int = 1,
) -> Partition:
    """The assignment to K groups with the largest between-group variance, by dynamic programming.

    Fisher's theorem: it is a cut of the sorted values into K intervals. Total variance is fixed, so
    we minimise the weighted squared error within. best[k][j]: least error of the first j distinct
    values in k groups. O(K u^2) for u distinct values.
    """
    if values.dim() == 2:
        rows = [
            partition(v, num_groups, weights=w, min_size=min_size)
            for v, w in zip(values, [None] * len(values) if weights is None else weights)
        ]
        if rows:
            return Partition(*(torch.stack(field) for field in zip(*rows)))
        blank = values.new_zeros(0, dtype=stat_dtype(values))
        return Partition(
            torch.zeros_like(values, dtype=torch.int32),
            blank.reshape(0, num_groups - 1),
            blank.reshape(0, num_groups),
            blank,
        )
    points = distinct_points(values, weights)
    u = len(points.values)
    n, w0, w1, w2 = (
        F.pad(t.cpu().cumsum(0), (1, 0))
        for t in (
            points.members.double(),
            points.mass,
            points.mass * points.centred,
            points.mass * points.centred.square(),
        )
    )
    begins = torch.arange(u + 1)

    def errors_ending_at(j: Tensor) -> Tensor:
        """(j, i) The squared error of points[i:j]; inf where it has too few members."""
        j = j[:, None]
        sw, sx, sxx = w0[j] - w0, w1[j] - w1, w2[j] - w2
        error = sxx - torch.where(sw > 0, sx.square() / torch.where(sw > 0, sw, 1), 0)
        few = (n[j] - n < min_size) | (begins >= j)
        return error.clamp(min=0).masked_fill(few, torch.inf)

    best = torch.full((num_groups + 1, u + 1), torch.inf, dtype=torch.float64)
    best[0, 0] = 0
    cut = torch.zeros(num_groups + 1, u + 1, dtype=torch.long)
    for ends in begins[1:].split(max(1, 2**20 // u)):
        errors = errors_ending_at(ends)
        # Of a block's own ends, level by level: those of the level below are there by then.
        for k in range(1, num_groups + 1):
            candidates = best[k - 1] + errors
            best[k, ends], cut[k, ends] = candidates.min(1)  # the first of equals: the lowest cut
    if not torch.isfinite(best[num_groups, u]):
        raise ValueError(
            f"values: no partition of {len(values)} values ({u} distinct) into "
            f"num_groups={num_groups} groups of at least min_size={min_size} members"
        )
    bounds = [u]
    for k in range(num_groups, 0, -1):
        bounds.append(int(cut[k, bounds[-1]]))
    starts = torch.tensor(bounds[::-1][1:-1], dtype=torch.long, device=values.device)
    return partition_at(values, points, starts)


class Points(NamedTuple):
    """The u distinct values of one row, ascending: no partition splits equal values."""

    values: Tensor  # (u)
    centred: Tensor  # (u) before any sums, so that an offset of 1e8 costs no digits
    members: Tensor  # (u) int64, how many values are equal to it
    mass: Tensor  # (u) their weight
    point_of: Tensor  # (n) int64, the point of each value


def distinct_points(values: Tensor, weights: Tensor | None) -> Points:
    x = values.detach().double()
    w = torch.ones_like(x) if weights is None else weights.detach().double()
    distinct, index, members = x.unique(return_inverse=True, return_counts=True)  # sorted
    mass = torch.zeros_like(distinct).index_add(0, index, w)
    total = mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
    from_first = distinct - distinct[0]
    return Points(distinct, from_first - (mass * from_first).sum() / total, members, mass, index)


def partition_at(values: Tensor, points: Points, starts: Tensor) -> Partition:
    """The result for groups 1..K-1 that begin at the points `starts`.

    A group without weight has no mean and adds nothing: it is centred between its smallest and its
    largest member.
    """
    num_groups = len(starts) + 1
    group_of_point = torch.zeros_like(points.members)
    group_of_point[starts] = 1
    group_of_point = group_of_point.cumsum(0)
    stats = group_stats(points.centred, group_of_point, num_groups, weights=points.mass)
    first = F.pad(starts, (1, 0))
    last = F.pad(starts, (0, 1), value=len(points.values)) - 1
    middle = points.centred[first] / 2 + points.centred[last] / 2
    means = torch.where(stats.count > 0, stats.mean, middle)
    share = stats.count / stats.count.sum().clamp(min=torch.finfo(torch.float64).tiny)
    dtype = stat_dtype(values)
    return Partition(
        group_of_point[points.point_of].int(),
        (points.values[starts - 1] / 2 + points.values[starts] / 2).to(dtype),
        (means + (points.values[0] - points.centred[0])).to(dtype),
        (share * (means - (share * means).sum()).square()).sum().to(dtype),
    )


def _weighted_mean(mass: Tensor, returns: Tensor) -> Tensor:
    """Masses from fp32 probabilities sum to 1 +- 1e-7 only: at an offset of 1e6, 0.1 too much."""
    return (mass * returns).sum() / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


def _variance(form: str, mass: Tensor, returns: Tensor) -> Tensor:
    if form == "uniform":
        return (returns - returns.mean()).square().mean()
    if form == "mass":
        return (mass * (returns - _weighted_mean(mass, returns)).square()).sum()
    return (returns.max().detach() - returns).clamp(min=0).square().mean()  # one_sided


def _variance_slope(form: str, mass: Tensor, returns: Tensor) -> Tensor:
    """dVar / dR_g at fixed mass."""
    if form == "uniform":
        return 2 / returns.shape[0] * (returns - returns.mean())
    if form == "mass":
        return 2 * mass * (returns - _weighted_mean(mass, returns))
    return -2 / returns.shape[0] * (returns.max() - returns).clamp(min=0)


def _soft_sums(
    probs: Tensor, returns: Tensor, reduce: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Mass f_g and return R_g of each group over all ranks; gradients through the local part.

    float64, so that a common offset of 1e6 in the returns leaves their differences intact.
    """
    p, r = probs.double(), returns.double()
    local = torch.cat(
        [p.sum(0), (p * r.unsqueeze(1)).sum(0), r.sum()[None], p.new_full((1,), r.shape[0])]
    )
    total = local
    if reduce is not None:  # the difference is exactly 0, so that all ranks have the same total
        total = reduce(local.detach().clone()) + (local - local.detach())
    m = p.shape[1]
    mass, sums, mean = total[:m], total[m : 2 * m], total[-2] / total[-1].clamp(min=1)
    filled = mass > 0
    # An empty group takes the mean of all, so that it neither pulls nor is pulled.
    group_returns = torch.where(filled, sums / torch.where(filled, mass, 1), mean)
    return mass / total[-1].clamp(min=1), group_returns


def soft_groups(
    logits: Tensor,  # (S, M)
    returns: Tensor,  # (S)
    *,
    form: str = "mass",
    reduce: Callable[[Tensor], Tensor] | None = None,  # local sums -> their sum over ranks
) -> SoftGroups:
    """Differentiable masses, returns and variance of soft groups."""
    dtype = stat_dtype(logits, returns)
    probs = logits.to(dtype).softmax(-1)
    mass, group_returns = _soft_sums(probs, returns, reduce)
    variance = _variance(form, mass, group_returns)
    return SoftGroups(probs, mass.to(dtype), group_returns.to(dtype), variance.to(dtype))


def group_weights(
    probs: Tensor,  # (S, M)
    returns: Tensor,  # (S)
    beta: float,
    *,
    form: str = "mass",
    clamp: tuple[float, float] = (0.0, 5.0),
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """c_i = 1 - beta * sum_g dVar/dR_g * p_ig / f_g, clamped; no gradient."""
    with torch.no_grad():
        mass, group_returns = _soft_sums(probs, returns, reduce)
        slope = _variance_slope(form, mass, group_returns)
        per_group = torch.where(mass > 0, slope / torch.where(mass > 0, mass, 1), 0)
        weights = 1 - beta * probs.double() @ per_group
        return weights.clamp(*clamp).to(stat_dtype(probs, returns))


# --- MetaRM -------------------------------------------------------------------------------------


def preference_loss(
    chosen: Tensor,  # (P)
    rejected: Tensor,  # (P)
    *,
    margin: float | Tensor | None = None,  # a number, or (P)
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected - margin), some labels flipped."""
    dtype = stat_dtype(chosen, rejected)
    d = chosen.to(dtype) - rejected.to(dtype)
    if margin is not None:
        d = d - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d)
    return loss.mean() if d.shape[0] else d.sum()


def difference_objective(rewards: Tensor) -> Tensor:  # (P, k)
    """Mean over prompts of (2 / k^2) sum_{i<j} sigmoid(|r_i - r_j|)."""
    r = rewards.to(stat_dtype(rewards))
    k = r.shape[1]
    i, j = torch.triu_indices(k, k, 1, device=r.device)
    per_prompt = 2 / k**2 * torch.sigmoid((r[:, i] - r[:, j]).abs()).sum(1)
    return per_prompt.mean() if r.shape[0] else per_prompt.sum()


@contextmanager
def meta_ascent(
    params: Iterable[torch.nn.Parameter], lr: float, *, normalise: bool = False
) -> Iterator[None]:
    """theta' = theta + lr * grad inside, theta bit for bit outside; gradients at theta' stay."""
    params = list({id(p): p for p in params if p.grad is not None}.values())  # tied: once
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            grads = [p.grad for p in params if p.grad is not None]
            norm = torch.stack([g.double().norm() for g in grads]).norm() if grads else 0
            scale = lr if not normalise else (lr / norm if norm > 0 else 0)
            for p, g in zip(params, grads):
                p.add_(g * scale)
                p.grad = None
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(params, kept):
                p.copy_(original)
