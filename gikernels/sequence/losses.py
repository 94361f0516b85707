"""Losses of PPO and of the reward model, as sums over a mask divided by a GLOBAL denominator.

A mean of micro-batch means depends on how the batch was cut; a sum over `denom`, the number of
tokens of the whole optimiser step on all ranks, does not. Metrics are sums over the same `denom`,
so they too add over micro-batches and ranks. These are a few reductions over (S, T) numbers, which
torch.compile fuses as they stand in reference.py; here their arguments are checked.
"""

from __future__ import annotations

from torch import Tensor

from gikernels import reference
from gikernels.backends import checks
from gikernels.reference import LossOut


def ppo_loss(
    logprobs: Tensor,  # any shape, the only one with a gradient
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens
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
    denom = checks.denominator(denom)
    checks.number("clip_low", clip_low, at_least=0, at_most=1)
    checks.number("clip_high", clip_high, at_least=0)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, above=1)
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


def value_loss(
    values: Tensor,  # any shape, the only one with a gradient
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,  # bool
    *,
    denom: float | Tensor,  # the GLOBAL number of tokens
    clip: float | None = 0.2,  # None: plain squared error
) -> LossOut:
    """The critic's clipped squared error:

        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = 0.5 * max((values - returns) ** 2, (clipped - returns) ** 2)
        return (loss * mask).sum() / denom

    Metrics: clipfrac, and error, the squared error without clip and factor.
    """
    _check_tokens(values, mask, name="values", old_values=old_values, returns=returns)
    denom = checks.denominator(denom)
    if clip is not None:
        checks.number("clip", clip, at_least=0)
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
    """How far a reward model tells samples of one prompt apart, the J of MetaRM (METHODS B):

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
