"""What the models say of answers before any update, and whether an engine sampled from them.

S sequences, T padded answer tokens, M groups. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.sequences import Sequences, forward_all
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.rollout.engine import Engine, Rollout, check_logprobs


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
