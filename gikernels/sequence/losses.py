"""Losses of PPO and of the reward model, as sums over a mask divided by a GLOBAL denominator.

A mean of micro-batch means depends on how the batch was cut; a sum over `denom`, the number of
tokens of the whole optimiser step on all ranks, does not. Metrics are sums over the same `denom`,
so they too add over micro-batches and ranks. These are a few reductions over (S, T) numbers, which
torch.compile fuses as they stand in reference.py; here their arguments are checked.

`denom` says how tokens are averaged, and nothing else has to:

    every token alike         the number of tokens (DAPO)
    every answer alike        S * lengths, one for each token: GRPO's mean of means
    by a constant             S * the longest answer allowed: Dr. GRPO (arXiv 2503.20783), together
                              with group_advantages(..., scale="none")
"""

from __future__ import annotations

from torch import Tensor

from gikernels import reference
from gikernels.backends import checks
from gikernels.backends.symbols import bounds
from gikernels.reference import LossOut


def ppo_loss(
    logprobs: Tensor,  # any shape, the only one with a gradient
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens; or like mask: each token's own
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOut:
    """The clipped surrogate of PPO:

        ratio = exp(logprobs - old_logprobs)
        loss = max(-ratio * A, -ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        loss = where(A < 0, min(loss, -dual_clip * A), loss)        # where dual_clip is given
        return (loss * mask).sum() / denom

    Metrics: ratio, clipfrac (where the clip stops the gradient), approxkl (k3 of old to new).
    """
    _check_tokens(logprobs, mask, old_logprobs=old_logprobs, advantages=advantages)
    denom = checks.denominator(denom, mask)
    checks.number("clip_low", clip_low, at_least=0, at_most=1)
    checks.number("clip_high", clip_high, at_least=0)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, above=1)
    clip_low, clip_high = bounds(clip_low, clip_high, logprobs.device)
    return reference.ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        denom=denom,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )


def cispo_loss(
    logprobs: Tensor,  # any shape, the only one with a gradient
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens; or like mask: each token's own
    cap_low: float = 0.0,
    cap_high: float = 5.0,
) -> LossOut:
    """CISPO (arXiv 2506.13585): every token keeps a gradient, only its weight is capped:

        ratio = exp(logprobs - old_logprobs)
        loss = -ratio.detach().clamp(cap_low, cap_high) * A * logprobs
        return (loss * mask).sum() / denom

    Metrics: ratio, clipfrac (where a cap holds), approxkl (k3 of old to new).
    """
    _check_tokens(logprobs, mask, old_logprobs=old_logprobs, advantages=advantages)
    denom = checks.denominator(denom, mask)
    checks.caps(cap_low, cap_high)
    cap_low, cap_high = bounds(cap_low, cap_high, logprobs.device)
    return reference.cispo_loss(
        logprobs, old_logprobs, advantages, mask, denom=denom, cap_low=cap_low, cap_high=cap_high
    )


def gspo_loss(
    logprobs: Tensor,  # (S, T), the only one with a gradient
    old_logprobs: Tensor,  # (S, T)
    advantages: Tensor,  # (S)
    mask: Tensor,  # (S, T) bool
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    denom: float | Tensor | None = None,  # the GLOBAL number of sequences; None: those with a token
) -> LossOut:
    """GSPO (arXiv 2507.18071): one ratio for a sequence, which is clipped as PPO clips a token's:

        ratio = exp(((logprobs - old_logprobs) * mask).sum(1) / mask.sum(1))
        loss = max(-ratio * A, -ratio.clamp(1 - clip_low, 1 + clip_high) * A)
        return loss.sum() / denom

    With `denom` it adds over micro-batches and ranks; without, it is the mean over those sequences
    here that have an unmasked token. Metrics, over sequences: ratio, clipfrac, approxkl.
    """
    checks.dims("logprobs", checks.floats("logprobs", logprobs), 2, "(S, T)")
    _check_tokens(logprobs, mask, old_logprobs=old_logprobs)
    checks.shape("advantages", checks.floats("advantages", advantages), logprobs.shape[:1], "(S)")
    checks.same_device(logprobs=logprobs, advantages=advantages)
    checks.number("clip_low", clip_low, at_least=0, at_most=1)
    checks.number("clip_high", clip_high, at_least=0)
    if denom is not None:
        denom = checks.denominator(denom, advantages)
    clip_low, clip_high = bounds(clip_low, clip_high, logprobs.device)
    return reference.gspo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        denom=denom,
    )


def value_loss(
    values: Tensor,  # any shape, the only one with a gradient
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens; or like mask: each token's own
    clip: float | None = 0.2,  # None: plain squared error
) -> LossOut:
    """The critic's clipped squared error:

        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = 0.5 * max((values - returns) ** 2, (clipped - returns) ** 2)
        return (loss * mask).sum() / denom

    Metrics: clipfrac, and error, the squared error without clip and factor.
    """
    _check_tokens(values, mask, name="values", old_values=old_values, returns=returns)
    denom = checks.denominator(denom, mask)
    if clip is not None:
        checks.number("clip", clip, at_least=0)
        clip, _ = bounds(clip, clip, values.device)
    return reference.value_loss(values, old_values, returns, mask, denom=denom, clip=clip)


def preference_loss(
    chosen: Tensor,  # (P)
    rejected: Tensor,  # (P)
    *,
    margin: float | Tensor | None = None,  # a number, or (P)
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry, the mean over pairs; d = chosen - rejected - margin:

    -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)
    """
    checks.dims("chosen", checks.floats("chosen", chosen), 1, "(P)")
    checks.floats("rejected", rejected)
    checks.shape("rejected", rejected, tuple(chosen.shape), "that of chosen, (P)")
    checks.same_device(chosen=chosen, rejected=rejected)
    if isinstance(margin, Tensor):
        checks.floats("margin", margin)
        checks.shape("margin", margin, tuple(chosen.shape), "that of chosen, (P), or a number")
        checks.same_device(chosen=chosen, margin=margin)
    elif margin is not None:
        checks.number("margin", margin)
    checks.number("label_smoothing", label_smoothing, at_least=0, below=1)
    return reference.preference_loss(
        chosen, rejected, margin=margin, label_smoothing=label_smoothing
    )


def difference_objective(rewards: Tensor) -> Tensor:  # (P, k), k samples of each prompt
    """How far a reward model tells samples of one prompt apart, the J of MetaRM:

    (2 / k ** 2) * sigmoid((r_i - r_j).abs()) summed over pairs i < j, the mean over prompts
    """
    checks.dims("rewards", checks.floats("rewards", rewards), 2, "(P, k)")
    if rewards.shape[1] == 0:
        raise checks.wrong("rewards", rewards, "at least one sample of each prompt")
    return reference.difference_objective(rewards)


def _check_tokens(first: Tensor, mask: Tensor, name: str = "logprobs", **others: Tensor) -> None:
    checks.floats(name, first)
    for other, x in others.items():
        checks.shape(other, checks.floats(other, x), tuple(first.shape), f"that of {name}")
    checks.shape("mask", checks.bools("mask", mask), tuple(first.shape), f"that of {name}")
    checks.same_device(**{name: first}, **others, mask=mask)
