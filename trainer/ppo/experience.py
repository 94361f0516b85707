"""From what the models say of rollouts to what PPO trains on: penalised rewards and advantages.

S sequences, T padded answer tokens. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import gikernels
from trainer.config import Config
from trainer.ppo.build import Setup
from trainer.ppo.draw import Answers, focused
from trainer.ppo.forward import Forward, Look
from trainer.ppo.groups import performance
from trainer.runs.loop import Metrics


@dataclass(frozen=True)
class Batch:
    """An iteration's answers, and all that was known of them before any update."""

    answers: Answers
    raw: dict[str, Tensor]  # (S) each: "total", and what it is made of
    scores: Tensor  # (S) what the policy is rewarded with: normalised and clipped
    forward: Forward
    importance: Tensor  # (S, T)
    probs: Tensor  # (S, M) p_ig
    kl_coef: Tensor  # (S) eta_i
    experience: gikernels.Experience
    performance: Tensor  # (S) R_i
    labels: Tensor | None  # (S) targets of the head: the exact partition
    learns_values: bool

    @property
    def mask(self) -> Tensor:  # (S, T) bool
        return self.answers.sequences.mask

    def metrics(self) -> Metrics:
        seq_kl, parts = self.experience.seq_kl, {**self.raw}
        out = {
            "objective/scores": mean(parts.pop("total")),
            "objective/rlhf_reward": mean(self.scores - self.kl_coef * seq_kl),
            "objective/kl": mean(seq_kl),
            "objective/kl_coef": mean(self.kl_coef),
            "objective/entropy": mean(self.forward.entropy[self.mask]),
        }
        out |= {f"reward/{name}": mean(part) for name, part in parts.items()}
        if self.forward.values is not None and self.learns_values:
            out["value/explained_var"] = explained_variance(
                self.forward.values, self.experience.returns, self.mask
            )
        return out


def assess(t: Setup, answers: Answers, raw: dict[str, Tensor], seen: Look, step: int) -> Batch:
    """Who belongs to which group, what that does to the KL penalty, and what an answer is worth."""
    config, groups, normaliser = t.config, t.signals.groups, t.signals.normaliser
    forward, total = seen.forward, raw["total"]
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
    if not focused(t, step):
        groups.cut(forward.group_logits)
    probs = groups.observe(groups.probs(forward.group_logits, answers.prompts), returns)
    kl_coef = groups.kl_coefs(probs)
    exp = estimate(config, forward, scores, answers.sequences.mask, kl_coef, probs, answers.samples)
    if config.groups.returns == "penalised":
        returns = returns - kl_coef * exp.seq_kl
    return Batch(
        answers=answers,
        raw=raw,
        scores=scores,
        forward=forward,
        importance=seen.importance,
        probs=probs,
        kl_coef=kl_coef,
        experience=exp,
        performance=returns,
        labels=groups.labels(returns),
        learns_values=config.ppo.has_critic,
    )


def estimate(
    config: Config,
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


def mean(x: Tensor) -> float:
    return float(x.double().mean())
