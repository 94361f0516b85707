"""The PPO loss in the shape that verl and OpenRLHF ask for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import gikernels

MAX_LOG_RATIO = 20.0  # both clamp here: exp of more is no use to anyone


class PolicyLossParts(NamedTuple):
    loss: Tensor
    clipped: Tensor  # share of this rank's tokens where the PPO clip is in force
    dual_clipped: Tensor  # ... where the dual clip is
    kl: Tensor  # mean of old - new log-probability over this rank's tokens


def weighted_ppo_loss(
    logprobs: Tensor,  # (S, T)
    old_logprobs: Tensor,  # (S, T)
    advantages: Tensor,  # (S, T)
    mask: Tensor,  # (S, T) bool
    *,
    denom: float | Tensor,
    token_weights: Tensor | None = None,  # (S, T), >= 0
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyLossParts:
    """sum(token_weights * ppo over mask) / denom.

    PPO's loss is homogeneous in the advantage, L(w A) = w L(A) for w >= 0, so that weights of a
    token's loss (1 / length, importance weights) go into its advantage.
    """
    log_ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = advantages.detach()
    loss = gikernels.ppo_loss(
        log_ratio,
        torch.zeros_like(log_ratio),
        advantages if token_weights is None else advantages * token_weights.detach(),
        mask,
        denom=denom,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    ).loss
    with torch.no_grad():
        ratio, a = log_ratio[mask].exp(), advantages[mask]
        count = max(len(a), 1)
        clipped = ((a > 0) & (ratio > 1 + clip_high)) | ((a < 0) & (ratio < 1 - clip_low))
        dual = (a < 0) & (ratio > (torch.inf if dual_clip is None else dual_clip))
        kl = -log_ratio[mask].sum() / count
    return PolicyLossParts(loss, clipped.sum() / count, dual.sum() / count, kl)


def sequence_mean_weights(mask: Tensor) -> Tensor:  # (S, T) bool -> (S, T)
    """Weights that turn a sum over tokens into a sum of the sequences' means."""
    return (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)
