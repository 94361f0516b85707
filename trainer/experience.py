"""From rollouts to what PPO trains on: log-probabilities, penalised rewards, advantages.

S sequences, T padded answer tokens. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batching import Sequences, forward_all
from trainer.models import Critic, Policy
from trainer.rollout import Engine, Rollout, check_logprobs


class Forward(NamedTuple):
    """What the models say of an iteration's answers before any update."""

    logprobs: Tensor  # (S, T) of the policy
    entropy: Tensor  # (S, T)
    ref_logprobs: Tensor  # (S, T)
    exact_kl: Tensor | None  # (S, T), where kl.estimator asks for it
    values: Tensor | None  # (S, T), where there is a critic
    group_logits: Tensor | None  # (S, M) of the critic's head


def forward_models(
    config, policy: Policy, reference: Policy, critic: Critic | None, sequences: Sequences
) -> Forward:
    budget = config.trainer.tokens_per_microbatch
    temperature = config.rollout.temperature
    exact = config.kl.estimator == "exact"

    def policy_and_reference(batch: Sequences) -> tuple[Tensor, ...]:
        theirs = reference(batch, temperature)
        with parallel.unsharded(reference) if exact else contextlib.nullcontext():
            ours = policy(batch, temperature, reference if exact else None)
        return (ours.logprobs, ours.entropy, theirs.logprobs) + ((ours.kl,) if exact else ())

    with parallel.autocast(config.model.dtype):
        logprobs, entropy, ref_logprobs, *kl = forward_all(policy_and_reference, sequences, budget)
        values, group_logits = (
            forward_all(critic, sequences, budget) if critic is not None else (None, None)
        )
    return Forward(logprobs, entropy, ref_logprobs, kl[0] if kl else None, values, group_logits)


def check_engine(
    config, engine: Engine, rollout: Rollout, policy: Policy, most: int = 256
) -> float:
    """check_logprobs for rollouts whose log-probabilities nothing else computes: of the first
    answers."""
    rows = torch.arange(min(most, len(rollout.truncated)), device=rollout.truncated.device)
    sequences = rollout.sequences.rows(rows)
    width = sequences.mask.shape[1]
    some = Rollout(sequences, rollout.truncated[rows], rollout.logprobs[rows, :width])
    with parallel.autocast(config.model.dtype), torch.no_grad():
        (logprobs,) = forward_all(
            lambda part: (policy(part, config.rollout.temperature).logprobs,),
            sequences,
            config.trainer.tokens_per_microbatch,
        )
    return check_logprobs(some, logprobs, config.rollout.logprob_bound, engine.synced)


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
