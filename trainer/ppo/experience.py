"""From what the models say of rollouts to what PPO trains on: penalised rewards and advantages.

S sequences, T padded answer tokens. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gikernels
from trainer.ppo.forward import Forward


def estimate(
    config,
    forward: Forward,
    scores: Tensor,  # (S) normalised
    mask: Tensor,  # (S, T) bool
    kl_coef: Tensor,  # (S)
    probs: Tensor,  # (S, M) groups, for norm "group"
    samples: int,  # of each prompt, side by side
) -> gikernels.Experience:
    """Penalised rewards, and advantages by a critic or by a prompt's other samples."""
    logprobs, ref_logprobs, estimator = (
        forward.logprobs,
        forward.ref_logprobs,
        config.kl.estimator,
    )
    if forward.exact_kl is not None:  # k1 of (kl, 0) is kl itself
        logprobs, ref_logprobs = forward.exact_kl, torch.zeros_like(forward.exact_kl)
        estimator = "k1"
    if config.ppo.kl_in_loss:
        kl_coef = torch.zeros_like(kl_coef)
    by_group = config.ppo.norm == "group"
    group, num_groups = (probs.argmax(1).int(), probs.shape[1]) if by_group else (None, None)
    if config.ppo.advantages == "gae":
        return gikernels.experience(
            logprobs,
            ref_logprobs,
            forward.values,
            scores,
            mask,
            kl_coef,
            gamma=config.ppo.gamma,
            lam=config.ppo.lam,
            estimator=estimator,
            norm=config.ppo.norm,
            group_ids=group,
            num_groups=num_groups,
        )
    out = gikernels.experience(
        logprobs, ref_logprobs, None, scores, mask, kl_coef, estimator=estimator, norm="none"
    )
    # Without a critic a sequence has one return: its penalised score, which is compared with those
    # of its prompt's other samples, or of its inferred group.
    returns = out.returns[:, 0]
    if group is None:
        group = torch.arange(len(scores), device=scores.device, dtype=torch.int32) // samples
        num_groups = len(scores) // samples
    leave_one_out = config.ppo.advantages == "leave_one_out"
    advantages = gikernels.group_advantages(
        returns,
        group,
        num_groups,
        baseline="leave_one_out" if leave_one_out else "mean",
        scale="none" if leave_one_out else "std",
    )
    return out._replace(advantages=torch.where(mask, advantages.unsqueeze(1), 0))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the unmasked tokens."""

    def spread(x: Tensor) -> Tensor:
        return (x[mask].double() - x[mask].double().mean()).square().sum()

    return float(1 - spread(returns - values) / spread(returns).clamp(min=1e-12))
