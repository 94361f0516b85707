"""What an answer is worth: groups, KL coefficients, penalised rewards, advantages, in one pass.

    critic: values, the head's logits  ->  groups, eta_i  ->  reference  ->  the policy's hidden
    states, of which `linear_experience` makes log-probabilities, penalties, GAE, moments at once

S sequences, n answer tokens, flat, M groups. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

import gikernels
from gikernels import GroupStats, Support
from trainer import parallel
from trainer.batch.sequences import Piece, Sequences, gathered, on_device
from trainer.batch.support import here, of_rows
from trainer.config import Config
from trainer.models.policy import Head, Policy, log_probabilities
from trainer.ppo.build import Setup
from trainer.ppo.draw import Answers, chooses
from trainer.ppo.forward import View
from trainer.ppo.groups import performance
from trainer.rollout.engine import check_logprobs, importance_weights
from trainer.runs.loop import Metrics


@dataclass(frozen=True)
class Experience:
    """What one pass from the policy's hidden states leaves; before any update."""

    logprobs: Tensor  # (n) of the policy
    entropy: Tensor  # (n)
    ref_logprobs: Tensor  # (n)
    seq_kl: Tensor  # (S)
    advantages: Tensor  # (n) normalised
    returns: Tensor  # (n)


@dataclass(frozen=True)
class Batch:
    """An iteration's answers, and all that was known of them before any update."""

    answers: Answers
    raw: dict[str, Tensor]  # (S) each: "total", and what it is made of
    scores: Tensor  # (S) what the policy is rewarded with: normalised and clipped
    seen: View
    probs: Tensor  # (S, M) p_ig
    kl_coef: Tensor  # (S) eta_i
    experience: Experience
    performance: Tensor  # (S) R_i
    labels: Tensor | None  # (S) targets of the head: the exact partition
    importance: Tensor | None  # (n) what makes up for the engine's rounding
    told: Metrics  # of the engine's log-probabilities

    @property
    def sequences(self) -> Sequences:
        return self.answers.sequences

    @property
    def signal(self) -> Tensor:  # (S)
        """Mean |advantage| of each answer: how much there is to learn from it."""
        sizes = self.sequences.sums(self.experience.advantages.abs())
        return sizes / on_device(self.sequences.answer_lengths)

    def metrics(self) -> Metrics:
        exp, parts = self.experience, {**self.raw}
        out = {
            "objective/scores": mean(parts.pop("total")),
            "objective/rlhf_reward": mean(self.scores - self.kl_coef * exp.seq_kl),
            "objective/kl": mean(exp.seq_kl),
            "objective/kl_coef": mean(self.kl_coef),
            "objective/entropy": mean(exp.entropy),
        }
        out |= {f"reward/{name}": mean(part) for name, part in parts.items()}
        return out | self.told


def assess(t: Setup, answers: Answers, raw: dict[str, Tensor], seen: View, step: int) -> Batch:
    """Who belongs to which group, what that does to the KL penalty, and what an answer is worth."""
    config, groups, normaliser = t.config, t.signals.groups, t.signals.normaliser
    total = raw["total"]
    normaliser.observe(total)
    scores = normaliser(total)
    reference = t.signals.reference_scores.of(answers.chosen, answers.samples)
    returns = performance(
        config.groups.compared,
        scores,
        normaliser.bounded(total),
        None if reference is None else normaliser.bounded(reference),
        normaliser.scale,
    )
    if chooses(t, step):
        if seen.group_logits is not None:  # of each prompt's first answer; it reads the prompt
            t.signals.asked.tell(answers.chosen, seen.group_logits[:: answers.samples], step)
    else:
        groups.cut(seen.group_logits)
    probs = groups.observe(groups.probs(seen.group_logits, answers.prompts), returns)
    kl_coef = groups.kl_coefs(probs)
    exp = experience(t, answers, seen, scores, kl_coef, probs)
    synced, bound = t.actors.engine.synced, config.rollout.logprob_bound
    told = check_logprobs(answers.rollout, exp.logprobs, bound, synced)
    importance, figures = importance_weights(
        answers.rollout,
        exp.logprobs,
        config.ppo.importance,
        config.ppo.importance_cap,
        config.ppo.importance_beyond,
    )
    if config.groups.returns == "penalised":
        returns = returns - kl_coef * exp.seq_kl
    return Batch(
        answers=answers,
        raw=raw,
        scores=scores,
        seen=seen,
        probs=probs,
        kl_coef=kl_coef,
        experience=exp,
        performance=returns,
        labels=groups.labels(returns),
        importance=importance,
        told=told | figures | {"perf/sync_bytes": synced.bytes if synced else 0},
    )


def experience(
    t: Setup,
    answers: Answers,
    seen: View,
    scores: Tensor,  # (S) normalised
    kl_coef: Tensor,  # (S)
    probs: Tensor,  # (S, M) groups, for norm "group"
) -> Experience:
    """Reference, then policy, micro-batch by micro-batch; moments are merged over all of them and
    over ranks, and applied at the end."""
    config, sequences = t.config, answers.sequences
    penalty = torch.zeros_like(kl_coef) if config.ppo.kl_in_loss else kl_coef
    norm = config.ppo.norm if config.ppo.has_critic else "none"
    group = probs.argmax(1).int() if config.ppo.norm == "group" else None
    outputs: list[tuple[Piece, tuple[Tensor, ...]]] = []
    moments: list[Tensor] = []
    with torch.no_grad():
        for piece in sequences.pieces(config.trainer.tokens_per_microbatch):
            where, rows = sequences.flat(piece.rows), on_device(piece.rows)
            values = (
                seen.values[where] if config.ppo.has_critic and seen.values is not None else None
            )
            stats, exp, ref_logprobs = single_pass(
                config,
                t.actors.policy,
                t.actors.reference,
                sequences.rows(piece.rows),
                here(of_rows(answers.rollout.support, sequences, piece.rows)),
                values,
                scores[rows],
                penalty[rows],
                norm,
                None if group is None or norm == "none" else group[rows],
                probs.shape[1],
            )
            flat = (stats.logprobs, stats.entropy, ref_logprobs, exp.advantages, exp.returns)
            outputs.append((piece, (*flat, exp.seq_kl)))
            moments.append(exp.moments if piece.weight else torch.zeros_like(exp.moments))
        logprobs, entropy, ref_logprobs, advantages, returns, seq_kl = (
            gathered(sequences, [(piece, each[i]) for piece, each in outputs], i < 5)
            for i in range(6)
        )
        if config.ppo.has_critic and norm != "none":
            of = None if group is None else group[sequences.sequence_of]
            everyone = torch.ones_like(advantages, dtype=torch.bool)
            advantages = gikernels.normalize_advantages(advantages, everyone, merged(moments), of)
        elif not config.ppo.has_critic:
            advantages = among_samples(config, sequences, returns, group, probs.shape[1], answers)
    return Experience(logprobs, entropy, ref_logprobs, seq_kl, advantages, returns)


def single_pass(
    config: Config,
    policy: Policy,
    reference: Policy,
    part: Sequences,
    support: Support | None,
    values: Tensor | None,
    scores: Tensor,
    kl_coef: Tensor,
    norm: str,
    group: Tensor | None,
    num_groups: int,
) -> tuple[gikernels.TokenStats, gikernels.Experience, Tensor]:
    """From hidden states to penalised rewards and advantages, not yet normalised."""
    temperature, exact = config.rollout.temperature, config.kl.estimator == "exact"

    def theirs(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
        return log_probabilities(temperature, support)(hidden, head, targets).logprobs, hidden

    ref_logprobs, ref_hidden = reference(part, theirs)

    def ours(
        hidden: Tensor, head: Head, targets: Tensor
    ) -> tuple[gikernels.TokenStats, gikernels.Experience]:
        return gikernels.linear_experience(
            hidden,
            head.weight,
            targets,
            part.cu_answers,
            ref_logprobs,
            values,
            scores,
            kl_coef,
            temperature=temperature,
            ref=(ref_hidden, reference.head.weight) if exact else None,
            estimator=config.kl.estimator,
            support=support,
            gamma=config.ppo.gamma,
            lam=config.ppo.lam,
            norm=norm,
            group_ids=group,
            num_groups=num_groups if group is not None else None,
            apply_norm=False,
            **head.options,
        )

    with parallel.unsharded(reference) if exact else contextlib.nullcontext():
        stats, exp = policy(part, ours)
    return stats, exp, ref_logprobs


def merged(moments: list[Tensor]) -> Tensor:  # (G, 3) each -> (G, 3)
    """Of all micro-batches, in their order, then of all ranks, in theirs."""
    stats = GroupStats(*moments[0].unbind(1))
    for other in moments[1:]:
        stats = gikernels.merge_stats(stats, GroupStats(*other.unbind(1)))
    every = parallel.all_ranks(torch.stack(list(stats), 1))  # (ranks, G, 3)
    stats = GroupStats(*every[0].unbind(1))
    for other in every[1:]:
        stats = gikernels.merge_stats(stats, GroupStats(*other.unbind(1)))
    return torch.stack(list(stats), 1)


def among_samples(
    config: Config,
    sequences: Sequences,
    returns: Tensor,  # (n)
    group: Tensor | None,  # (S)
    num_groups: int,
    answers: Answers,
) -> Tensor:  # (n)
    """Without a critic a sequence has one return: its penalised score, which is compared with those
    of its prompt's other samples, or of its inferred group."""
    each = returns[sequences.cu_answers[:-1].long()]
    if group is None:
        count = len(answers.chosen)
        group = torch.arange(count, device=each.device, dtype=torch.int32)
        group, num_groups = group.repeat_interleave(answers.samples), count
    leave_one_out = config.ppo.advantages == "leave_one_out"
    advantages = gikernels.group_advantages(
        each,
        group,
        num_groups,
        baseline="leave_one_out" if leave_one_out else "mean",
        scale="none" if leave_one_out else "std",
    )
    return advantages[sequences.sequence_of]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), (n) each."""

    def spread(x: Tensor) -> Tensor:
        return (x.double() - x.double().mean()).square().sum()

    return float(1 - spread(returns - values) / spread(returns).clamp(min=1e-12))


def mean(x: Tensor) -> float:
    return float(x.double().mean())
