"""What the models say of answers before any update, and whether an engine sampled from them.

S sequences, n answer tokens, flat, M groups. Every tensor here is a constant to autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.sequences import Sequences, forward_all, gathered
from trainer.batch.support import here, of_rows
from trainer.config import Config
from trainer.models.backbone import Use, adapter_of
from trainer.models.critic import Critic
from trainer.models.policy import Policy, log_probabilities
from trainer.rollout.engine import MEAN, Engine, LogprobMismatch, Rollout, check_logprobs

FARTHEST = 1e3
"""That an adapter's weights are moved, for a proof."""


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


def prove_adapter(config: Config, engine: Engine, policy: Policy, prompts: list[list[int]]) -> None:
    """That an engine samples with the policy's adapter, where it has one.

    As it begins an adapter adds nothing, so for many steps nobody would see one that never arrives
    (verl#7495). Here it is moved far enough to be missed, sampled with, compared, and put back bit
    for bit.
    """
    use = policy.through
    if not isinstance(use, Use) or use.adapter is None:
        return
    own = adapter_of(policy.model, use.adapter)
    before = {name: p.detach().clone() for name, p in own.items()}
    limit = config.rollout.max_new_tokens
    told = Sequences.of(prompts, [prompt[:limit] for prompt in prompts])
    nothing = torch.zeros(told.count, device=parallel.device())
    asked = Rollout(told, torch.zeros(len(told), dtype=torch.bool), nothing)
    without = answer_logprobs(config, Policy(policy.model, Use(use.backbone, None)), asked)
    far, size = 10 * MEAN * config.rollout.logprob_bound, 1e-3
    try:
        with torch.no_grad():
            while (moved := _apart(answer_logprobs(config, policy, asked), without)) < far:
                size *= 2
                for name, p in own.items():
                    noise = torch.randn(p.shape, generator=parallel.generator("proof", name))
                    p.copy_(before[name] + size * noise.to(p.device))
                if size > FARTHEST:
                    raise LogprobMismatch(
                        f"rollout.logprob_bound={config.rollout.logprob_bound:g} could not tell a "
                        f"missing adapter: the farthest of {len(own)} weights moves "
                        f"log-probabilities by {moved:.2g} on average, want {far:g}; lower it"
                    )
        engine.sync(policy)
        rollout = engine.generate(prompts, 1, parallel.generator(config.run.seed, "proof"))
        check_engine(config, engine, rollout, policy)
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(before[name])


def _apart(found: Tensor, other: Tensor) -> float:
    return float((found - other).abs().mean())


def check_engine(
    config: Config, engine: Engine, rollout: Rollout, policy: Policy, most: int = 256
) -> dict[str, float]:
    """check_logprobs for rollouts whose log-probabilities nothing else computes: of the first
    answers."""
    rows = torch.arange(min(most, len(rollout.sequences)))
    some = rollout.rows(rows)
    logprobs = answer_logprobs(config, policy, some)
    return check_logprobs(some, logprobs, config.rollout.logprob_bound, engine.synced)
