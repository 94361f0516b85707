"""What the models say of answers before any update, and whether an engine sampled from them.

S sequences, n answer tokens, flat, M groups. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batch.sequences import Sequences, forward_all, gathered
from trainer.batch.support import here, of_rows
from trainer.config import Config
from trainer.models.critic import Critic
from trainer.models.policy import Policy, log_probabilities
from trainer.rollout.engine import Engine, Rollout, check_logprobs


class View(NamedTuple):
    """What the critic says."""

    values: Tensor | None  # (n)
    group_logits: Tensor | None  # (S, M) of its head

    @property
    def named(self) -> dict[str, Tensor | None]:
        """For a guard to look at."""
        return {"values": self.values, "group logits": self.group_logits}


def view(config: Config, critic: Critic | None, sequences: Sequences) -> View:
    if critic is None:
        return View(None, None)
    budget = config.trainer.tokens_per_microbatch
    return View(*forward_all(critic, sequences, budget, (True, False)))


def answer_logprobs(config: Config, policy: Policy, rollout: Rollout) -> Tensor:  # (n)
    """Of the distribution that the answers were sampled from, were it this policy's."""
    sequences, parts = rollout.sequences, []
    with torch.no_grad():
        for piece in sequences.pieces(config.trainer.tokens_per_microbatch):
            support = here(of_rows(rollout.support, sequences, piece.rows))
            ask = log_probabilities(config.rollout.temperature, support)
            parts.append((piece, policy(sequences.rows(piece.rows), ask).logprobs))
        return gathered(sequences, parts, True)


def check_engine(
    config: Config, engine: Engine, rollout: Rollout, policy: Policy, most: int = 256
) -> dict[str, float]:
    """check_logprobs for rollouts whose log-probabilities nothing else computes: of the first
    answers."""
    rows = torch.arange(min(most, len(rollout.sequences)))
    some = rollout.rows(rows)
    logprobs = answer_logprobs(config, policy, some)
    return check_logprobs(some, logprobs, config.rollout.logprob_bound, engine.synced)
