"""Answers sampled from a policy, behind one small interface.

    engine = make_engine(config, tokenizer)
    engine.sync(policy, step)                               # after every update of the weights
    rollout = engine.generate(prompts, samples, generator)  # row i * samples + k: sample k of i
    engine.rest()                                           # the trainer wants the memory

An engine samples from the policy itself (top-p 1, the config's temperature), stops after EOS or a
stop text, and returns the log-probabilities it sampled with, which the trainer compares with its
own after every sync. What differs by less than the bound, importance weights can make up for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.sequences import Sequences
from trainer.models.policy import Policy


@dataclass(frozen=True)
class Sync:
    """How an engine came by its weights: what a message has to name when they are not the
    trainer's."""

    number: int  # in this process, from 1
    kind: str
    step: int | None  # that the weights are of; None: not of a policy in training
    bytes: int  # that reached this rank's engine
    trained: bool = False  # a policy in training has been here, now or before

    def __str__(self) -> str:
        step = "" if self.step is None else f", weights of step {self.step}"
        return f"sync {self.number} ({self.kind}{step})"


def next_sync(last: Sync | None, step: int | None, moved: int, slept: bool = False) -> Sync:
    before = last is not None and last.trained
    if last is None or (step is not None and not before):
        kind = "the first after a resume" if step else "the first"
    else:
        kind = "after sleep" if slept else "an update"
    trained = before or step is not None
    return Sync(last.number + 1 if last else 1, kind, step, moved, trained)


@dataclass(frozen=True)
class Rollout:
    """Each prompt's samples stand together: row i * samples + k is sample k of prompt i."""

    sequences: Sequences
    truncated: Tensor  # (S) bool: stopped at the length limit, without EOS or a stop text
    logprobs: Tensor  # (S, T) of the sampled tokens, as the engine saw them


class Engine(Protocol):
    synced: Sync | None

    def sync(self, policy: Policy, step: int | None = None) -> None:
        """Sample from these weights from now on; `step` is what they are of, for messages."""

    def generate(
        self, prompts: list[list[int]], samples: int, generator: torch.Generator
    ) -> Rollout: ...

    def rest(self) -> None:
        """Nothing is sampled before the next sync: give back the memory that can be."""


class LogprobMismatch(RuntimeError):
    """The engine did not sample from the policy that is being trained."""


def check_logprobs(
    rollout: Rollout, logprobs: Tensor, bound: float, sync: Sync | None = None
) -> float:
    """Largest difference between the engine's log-probabilities and ours; raises past `bound`.

    An engine with stale weights, another temperature or a cut vocabulary trains without a word and
    to no good: this is where it is seen. `sync` is how the engine came by its weights.
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
            + (f": look at {sync}" if sync else "")
        )
    return largest


def importance_weights(
    rollout: Rollout, logprobs: Tensor, kind: str, cap: float
) -> tuple[Tensor, dict[str, float]]:
    """(S, T) factors of the policy loss, min(ours / the engine's probability, cap), and metrics.

    Answers come from the engine's distribution, whose rounding is not the trainer's. `token` weighs
    each token by its own ratio, `sequence` a whole answer by the product of its tokens' ratios;
    `none` is 1 everywhere. Constants to autograd.
    """
    mask = rollout.sequences.mask
    if kind == "none":
        return torch.ones_like(logprobs), {}
    log_ratio = (logprobs - rollout.logprobs).masked_fill(~mask, 0).double()
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    whole = log_ratio.exp()
    weights = whole.clamp(max=cap)
    each = weights[:, 0] if kind == "sequence" else weights[mask]
    metrics = {
        "importance/mean": float(each.mean()),
        "importance/capped": float((each >= cap).double().mean()),
        # 1: as good as samples of our own; 0.5: half of them are as good as lost
        "importance/effective": float(each.sum() ** 2 / (len(each) * each.square().sum())),
    }
    return weights.to(logprobs.dtype), metrics


def end_tokens(tokenizer: PreTrainedTokenizerBase, policy: Policy) -> set[int]:
    """What ends an answer: EOS, and what the model's own generation settings name beside it."""
    model = policy.model
    named = model.generation_config.eos_token_id if model.can_generate() else None
    return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}


def gathered(
    prompts: list[list[int]],
    samples: int,
    tokens: Tensor,  # (S, limit), and like the others zero where another rank has sampled
    logprobs: Tensor,  # (S, limit)
    lengths: Tensor,  # (S)
    truncated: Tensor,  # (S) 0 or 1
    pad: int,
) -> Rollout:
    """Every rank's answers, on every rank."""
    tokens, logprobs, lengths, truncated = (
        parallel.all_sum(x) for x in (tokens, logprobs, lengths, truncated)
    )
    answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    shared = samples > 1 and parallel.world_size() == 1
    sequences = Sequences.of(repeated, answers, pad, shared=shared)
    return Rollout(sequences, truncated.bool(), logprobs[:, : int(lengths.max())])
