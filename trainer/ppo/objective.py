"""The policy's loss of some answers, as it is asked for inside the policy's forward.

`ppo.loss` says what is clipped, `ppo.aggregate` how tokens are averaged. All losses are sums over
denominators of the whole minibatch, so micro-batches and ranks add up. n answer tokens, flat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import gikernels
from gikernels import LossOut, Support, reference
from trainer.batch.sequences import Sequences, on_device
from trainer.config import Config
from trainer.models.policy import Ask, Head, log_probabilities


class Piece(NamedTuple):
    """A micro-batch, and what is known of its answer tokens, (n) each."""

    sequences: Sequences
    old_logprobs: Tensor
    advantages: Tensor  # with all weights
    mask: Tensor  # all False where it only keeps other ranks company
    ref_logprobs: Tensor | None  # where the penalty stands in the loss
    kl_coef: Tensor | float
    support: Support | None = None  # what the tokens could be sampled from; None: everything


def objective(config: Config, whole: Sequences, piece: Piece) -> Ask[LossOut]:
    """Of a piece of the minibatch `whole`."""
    ppo = config.ppo
    if ppo.loss == "gspo":
        return of_answers(config, whole, piece)

    def ask(hidden: Tensor, head: Head, targets: Tensor) -> LossOut:
        return gikernels.linear_policy_loss(
            hidden,
            head.weight,
            targets,
            piece.old_logprobs,
            piece.advantages,
            mask=piece.mask,
            denom=denominator(config, whole, piece.sequences),
            loss=ppo.loss,
            clip_low=ppo.clip_low,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip or None,
            cap_low=ppo.cispo_cap[0],
            cap_high=ppo.cispo_cap[1],
            ref_logprobs=piece.ref_logprobs,
            kl_coef=piece.kl_coef,
            kl_estimator=kl_estimator(config),
            entropy_coef=ppo.entropy_coef,
            temperature=config.rollout.temperature,
            support=piece.support,
            **head.options,
        )

    return ask


def of_answers(config: Config, whole: Sequences, piece: Piece) -> Ask[LossOut]:
    """GSPO: an answer's ratio is known after its last token, so no loss inside the operation."""
    ppo, padded = config.ppo, piece.sequences.padded

    def ask(hidden: Tensor, head: Head, targets: Tensor) -> LossOut:
        stats = log_probabilities(config.rollout.temperature, piece.support)(hidden, head, targets)
        loss, metrics = gikernels.gspo_loss(
            padded(stats.logprobs),
            padded(piece.old_logprobs),
            piece.advantages[piece.sequences.cu_answers[:-1].long()],
            padded(piece.mask),
            clip_low=ppo.gspo_clip[0],
            clip_high=ppo.gspo_clip[1],
            denom=len(whole),
        )
        penalty = -ppo.entropy_coef * stats.entropy
        if piece.ref_logprobs is not None:
            kl = reference.kl_estimate(stats.logprobs - piece.ref_logprobs, kl_estimator(config))
            penalty = penalty + piece.kl_coef * kl
        denom = denominator(config, whole, piece.sequences)
        return LossOut(loss + reference.token_sum(penalty, piece.mask, denom), metrics)

    return ask


def denominator(config: Config, whole: Sequences, piece: Sequences) -> float | Tensor:
    """By what a token's loss is divided, as `ppo.aggregate` says; one for each, where answers count
    alike, whatever their lengths."""
    if config.ppo.aggregate == "token":
        return float(whole.count)
    if config.ppo.aggregate == "constant":
        return float(len(whole) * config.rollout.max_new_tokens)
    lengths = piece.answer_lengths
    return on_device((len(whole) * lengths).to(torch.float32).repeat_interleave(lengths))


def kl_estimator(config: Config) -> str:
    """k3 for k1, whose gradient is zero in expectation."""
    return config.kl.estimator if config.kl.estimator in ("k2", "k3") else "k3"
