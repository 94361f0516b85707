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
from trainer.config import Config
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.rollout.engine import Engine, Rollout, check_logprobs, importance_weights


class Forward(NamedTuple):
    """What the models say of an iteration's answers before any update."""

    logprobs: Tensor  # (S, T) of the policy
    entropy: Tensor  # (S, T)
    ref_logprobs: Tensor  # (S, T)
    exact_kl: Tensor | None  # (S, T), where kl.estimator asks for it
    values: Tensor | None  # (S, T), where there is a critic
    group_logits: Tensor | None  # (S, M) of the critic's head


def forward_models(
    config: Config, policy: Policy, reference: Policy, critic: Critic | None, sequences: Sequences
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


class Look(NamedTuple):
    """The models' view of a rollout, and how far the engine's word is from it."""

    forward: Forward
    importance: Tensor  # (S, T): what makes up for the engine's rounding, 1 where it is not asked
    metrics: dict[str, float]

    @property
    def finite(self) -> dict[str, Tensor | None]:
        """What a guard has to look at."""
        return {"values": self.forward.values, "group logits": self.forward.group_logits}


def look(
    config: Config,
    policy: Policy,
    reference: Policy,
    critic: Critic | None,
    rollout: Rollout,
    engine: Engine,
) -> Look:
    """Raises where the engine did not sample from this policy."""
    forward = forward_models(config, policy, reference, critic, rollout.sequences)
    bound = config.rollout.logprob_bound
    mismatch = check_logprobs(rollout, forward.logprobs, bound, engine.synced)
    importance, metrics = importance_weights(
        rollout, forward.logprobs, config.ppo.importance, config.ppo.importance_cap
    )
    synced = engine.synced.bytes if engine.synced else 0
    metrics |= {"rollout/logprob_diff_max": mismatch, "perf/sync_bytes": synced}
    return Look(forward, importance, metrics)


def check_engine(
    config: Config, engine: Engine, rollout: Rollout, policy: Policy, most: int = 256
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
