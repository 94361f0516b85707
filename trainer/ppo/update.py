"""The two stages of an iteration's learning: critic and head, then the policy.

Sums over micro-batches and ranks with one global denominator. S sequences, n answer tokens, flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batch.order import minibatches
from trainer.batch.sequences import on_device
from trainer.batch.support import here, of_rows
from trainer.ppo.build import Setup
from trainer.ppo.experience import Batch, explained_variance
from trainer.ppo.objective import Piece, objective
from trainer.runs.averages import Averages
from trainer.runs.loop import Metrics


def train_critic(t: Setup, step: int, batch: Batch, updates: Averages) -> Metrics:
    """Stage 1: clipped value loss, and beside it the loss of the head that predicts the groups."""
    config, exp, old = t.config, batch.experience, batch.seen.values
    critic, optimizer = t.actors.critic, t.actors.critic_optimizer
    if critic is None or optimizer is None or old is None:
        return {}
    critic.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "critic", step, epoch):
            part, mine = batch.sequences.rows(chosen), on_device(chosen)
            head_loss = None
            if t.signals.groups.has_head:
                head_loss = t.signals.groups.head_loss(
                    batch.labels[mine] if batch.labels is not None else None,
                    batch.performance[mine],
                    partial(t.group_logits, part),
                )
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                where = batch.sequences.flat(chosen[rows])
                values, logits = critic(part.rows(rows))
                loss, figures = gikernels.value_loss(
                    values,
                    old[where],
                    exp.returns[where],
                    values.new_full(values.shape, bool(weight), dtype=torch.bool),
                    denom=part.count,
                    clip=config.ppo.value_clip or None,
                )
                if not config.ppo.has_critic:  # the head alone
                    loss = loss * 0
                updates.add("value", {"loss": loss, "clipfrac": figures["clipfrac"]})
                if head_loss is not None:
                    head = head_loss(logits, on_device(rows)) * weight
                    updates.add("value", {"head_loss": head})
                    loss = loss + head
                loss.backward()
            norm = optimizer.step(step, updates.open["value/loss"])
            updates.add("value", {"grad_norm": norm / parallel.world_size()})
            updates.update("value")
    critic.eval()
    if not config.ppo.has_critic:
        return {}
    return {"value/explained_var": explained_variance(old, exp.returns)}


def groups_now(t: Setup, batch: Batch) -> Tensor:
    """(S, M) p_ig by the head as stage 1 has left it, where the policy's weights look at it."""
    groups = t.signals.groups
    if groups.has_head and groups.needs_probs_again:
        return groups.probs(t.group_logits(batch.sequences), batch.answers.prompts)
    return batch.probs


def train_policy(t: Setup, step: int, batch: Batch, weights: Tensor, updates: Averages) -> None:
    """Stage 2: the clipped surrogate with advantages times `weights` (S), and importance weights;
    the loss is formed inside the policy's forward, from hidden states (`objective`)."""
    config, exp, policy = t.config, batch.experience, t.actors.policy
    each = weights[batch.sequences.sequence_of]
    if batch.importance is not None:
        each = each * batch.importance
    advantages = exp.advantages * each
    kl_coef = batch.kl_coef[batch.sequences.sequence_of] if config.ppo.kl_in_loss else None
    policy.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "policy", step, epoch):
            part = batch.sequences.rows(chosen)
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                where = batch.sequences.flat(chosen[rows])
                rows_now = part.rows(rows)
                piece = Piece(
                    rows_now,
                    exp.logprobs[where],
                    advantages[where],
                    advantages.new_full(where.shape, bool(weight), dtype=torch.bool),
                    None if kl_coef is None else exp.ref_logprobs[where],
                    0.0 if kl_coef is None else kl_coef[where],
                    here(of_rows(batch.answers.rollout.support, batch.sequences, chosen[rows])),
                )
                loss, figures = policy(rows_now, objective(config, part, piece))
                told = {k: figures[k] for k in ("ratio", "clipfrac", "approxkl")}
                updates.add("policy", {"loss": loss, **told})
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
