"""Answers sampled from a policy, behind one small interface.

    engine = make_engine(config, tokenizer)
    engine.sync(policy)                                     # after every update of the weights
    rollout = engine.generate(prompts, samples, generator)  # row i * samples + k: sample k of i

An engine samples from the policy itself (top-p 1, the config's temperature), stops after EOS, and
returns the log-probabilities it sampled with, which the trainer compares with its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.batching import Sequences


@dataclass(frozen=True)
class Rollout:
    """Each prompt's samples stand together: row i * samples + k is sample k of prompt i."""

    sequences: Sequences
    truncated: Tensor  # (S) bool: stopped at the length limit, without EOS
    logprobs: Tensor  # (S, T) of the sampled tokens, as the engine saw them


class Engine(Protocol):
    def sync(self, policy: torch.nn.Module) -> None:
        """Sample from these weights from now on."""

    def generate(
        self, prompts: list[list[int]], samples: int, generator: torch.Generator
    ) -> Rollout: ...


class LogprobMismatch(RuntimeError):
    """The engine did not sample from the policy that is being trained."""


def check_logprobs(rollout: Rollout, logprobs: Tensor, bound: float) -> float:
    """Largest difference between the engine's log-probabilities and ours; raises past `bound`.

    An engine with stale weights, another temperature or a cut vocabulary trains without a word and
    to no good: this is where it is seen.
    """
    mask = rollout.sequences.mask
    difference = (rollout.logprobs - logprobs).abs().masked_fill(~mask, 0)
    difference = difference.nan_to_num(torch.inf)
    largest = float(difference.max())
    if largest > bound:
        row, step = divmod(int(difference.argmax()), difference.shape[1])
        raise LogprobMismatch(
            f"rollout.logprob_bound={bound:g}: the engine's log-probabilities and the trainer's "
            f"differ by up to {largest:.3g} (answer {row}, token {step}: "
            f"{float(rollout.logprobs[row, step]):.4f} against {float(logprobs[row, step]):.4f}); "
            "the engine does not sample from the policy that is trained"
        )
    return largest


def make_engine(config, tokenizer) -> Engine:
    if config.rollout.engine == "hf":
        from trainer.rollout.hf import HuggingFaceEngine

        return HuggingFaceEngine(config, tokenizer)
    raise NotImplementedError(f"rollout.engine={config.rollout.engine} is not there yet")
