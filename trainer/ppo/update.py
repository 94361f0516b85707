"""The two stages of an iteration's learning: critic and head, then the policy.

Sums over micro-batches and ranks with one global denominator. S sequences, T padded answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batch.order import minibatches
from trainer.config import Config
from trainer.ppo.build import Setup
from trainer.ppo.experience import Batch
from trainer.runs.averages import Averages


def train_critic(t: Setup, step: int, batch: Batch, updates: Averages) -> None:
    """Stage 1: clipped value loss, and beside it the loss of the head that predicts the groups."""
    config, mask, exp = t.config, batch.mask, batch.experience
    critic, optimizer = t.actors.critic, t.actors.critic_optimizer
    if critic is None or optimizer is None:
        return
    old_values = batch.forward.values
    assert old_values is not None
    critic.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "critic", step, epoch):
            part = batch.answers.sequences.rows(chosen)
            denom = mask[chosen].sum()
            head_loss = None
            if t.signals.groups.has_head:
                head_loss = t.signals.groups.head_loss(
                    batch.labels[chosen] if batch.labels is not None else None,
                    batch.performance[chosen],
                    partial(t.group_logits, part),
                )
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                here = chosen[rows]
                with parallel.autocast(config.model.dtype):
                    values, logits = critic(part.rows(rows))
                width = values.shape[1]
                loss, figures = gikernels.value_loss(
                    values,
                    old_values[here, :width],
                    exp.returns[here, :width],
                    mask[here, :width] & bool(weight),
                    denom=denom,
                    clip=config.ppo.value_clip or None,
                )
                if not config.ppo.has_critic:  # the head alone
                    loss = loss * 0
                updates.add("value", {"loss": loss, "clipfrac": figures["clipfrac"]})
                if head_loss is not None:
                    head = head_loss(logits, rows) * weight
                    updates.add("value", {"head_loss": head})
                    loss = loss + head
                loss.backward()
            norm = optimizer.step(step, updates.open["value/loss"])
            updates.add("value", {"grad_norm": norm / parallel.world_size()})
            updates.update("value")
    critic.eval()


def groups_now(t: Setup, batch: Batch) -> Tensor:
    """(S, M) p_ig by the head as stage 1 has left it, where the policy's weights look at it."""
    groups = t.signals.groups
    if groups.has_head and groups.needs_probs_again:
        return groups.probs(t.group_logits(batch.answers.sequences), batch.answers.prompts)
    return batch.probs


def train_policy(t: Setup, step: int, batch: Batch, weights: Tensor, updates: Averages) -> None:
    """Stage 2: the clipped surrogate with advantages times `weights` (S), and importance weights.
    Sums over micro-batches and ranks with one global denominator."""
    config, mask, forward, policy = t.config, batch.mask, batch.forward, t.actors.policy
    advantages = batch.experience.advantages * (weights.unsqueeze(1) * batch.importance)
    policy.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "policy", step, epoch):
            part = batch.answers.sequences.rows(chosen)
            denom = mask[chosen].sum()
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                here = chosen[rows]
                with parallel.autocast(config.model.dtype):
                    stats = policy(part.rows(rows), config.rollout.temperature)
                width = stats.logprobs.shape[1]
                real = mask[here, :width] & bool(weight)
                loss, figures = gikernels.ppo_loss(
                    stats.logprobs,
                    forward.logprobs[here, :width],
                    advantages[here, :width],
                    real,
                    denom=denom,
                    clip_low=config.ppo.clip_low,
                    clip_high=config.ppo.clip_high,
                    dual_clip=config.ppo.dual_clip or None,
                )
                if config.ppo.entropy_coef:
                    loss = loss - config.ppo.entropy_coef * (stats.entropy * real).sum() / denom
                if config.ppo.kl_in_loss:
                    ref_logprobs = forward.ref_logprobs[here, :width]
                    cost = kl_loss(config, stats.logprobs, ref_logprobs, batch.kl_coef[here], real)
                    loss = loss + cost / denom
                updates.add("policy", {"loss": loss, **figures})
                loss.backward()
            norm = t.actors.policy_optimizer.step(step, updates.open["policy/loss"])
            updates.add("policy", {"grad_norm": norm / parallel.world_size()})
            updates.update("policy")
    policy.eval()


def shuffled(t: Setup, name: str, step: int, epoch: int) -> Iterator[Tensor]:
    """The minibatches' rows, another split in each epoch."""
    ppo = t.config.ppo
    generator = parallel.generator(t.config.run.seed, name, step, epoch)
    return minibatches(ppo.sequences_per_step, ppo.minibatches, generator, ppo.samples_per_prompt)


def kl_loss(
    config: Config, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: Tensor, mask: Tensor
) -> Tensor:
    """Sum of eta_i * KL_it, differentiable; k3, because k1's gradient is zero in expectation."""
    estimator = "k3" if config.kl.estimator in ("k1", "exact") else config.kl.estimator
    each = torch.arange(len(kl_coef), device=kl_coef.device, dtype=torch.int32)
    cost = gikernels.kl_penalty(logprobs, ref_logprobs, kl_coef, each, estimator=estimator)
    return (cost * mask).sum()
