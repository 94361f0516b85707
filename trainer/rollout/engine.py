"""Answers sampled from a policy, behind one small interface.

    engine = make_engine(config, tokenizer)
    engine.sync(policy, step)                               # after every update of the weights
    rollout = engine.generate(prompts, samples, draws)  # row i * samples + k: sample k of i
    engine.rest()                                           # the trainer wants the memory

An engine samples from the policy at the config's temperature, top-p and top-k, stops after EOS or a
stop text, and returns the log-probabilities it sampled with and the tokens that it could have
sampled. Over those the trainer renormalises, and it compares the log-probabilities with its own
after every sync. What differs by less than the bound, importance weights can make up for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gikernels import Support
from trainer import parallel
from trainer.batch.sequences import Sequences, on_device, ranges
from trainer.batch.support import gathered as gathered_support
from trainer.batch.support import joined, of_rows
from trainer.models.policy import Policy


@dataclass(frozen=True)
class Sync:
    """How an engine came by its weights: what a message has to name when they are not the
    trainer's."""

    number: int  # in this process, from 1
    kind: str
    step: int | None  # that the weights are of; None: not of a policy in training
    bytes: int  # that reached this rank's engine
    policy: weakref.ref[Policy]  # whose
    trained: bool = False  # a policy in training has been here, now or before

    def brought(self, policy: Policy, step: int | None) -> bool:
        """Whether it has brought these very weights. What is of no step is never taken for
        unchanged."""
        return step is not None and self.step == step and self.policy() is policy

    def __str__(self) -> str:
        step = "" if self.step is None else f", weights of step {self.step}"
        return f"sync {self.number} ({self.kind}{step})"


def next_sync(
    last: Sync | None, policy: Policy, step: int | None, moved: int, slept: bool = False
) -> Sync:
    before = last is not None and last.trained
    if last is None or (step is not None and not before):
        kind = "the first after a resume" if step else "the first"
    else:
        kind = "after sleep" if slept else "an update"
    trained = before or step is not None
    number = last.number + 1 if last else 1
    return Sync(number, kind, step, moved, weakref.ref(policy), trained)


@dataclass(frozen=True)
class Rollout:
    """Each prompt's samples stand together: row i * samples + k is sample k of prompt i."""

    sequences: Sequences
    truncated: Tensor  # (S) bool: stopped at the length limit, without EOS or a stop text
    logprobs: Tensor  # (n) of the sampled tokens, as the engine saw them
    support: Support | None = None  # of n tokens, on the CPU: what could be sampled; None: all

    @staticmethod
    def joined(parts: Sequence[Rollout]) -> Rollout:
        return Rollout(
            Sequences.joined([part.sequences for part in parts]),
            torch.cat([part.truncated for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            joined([part.support for part in parts]),
        )

    def rows(self, index: Tensor) -> Rollout:
        """Some of the answers, in this order; `index` is on the CPU."""
        return Rollout(
            self.sequences.rows(index),
            self.truncated[on_device(index)],
            self.logprobs[self.sequences.flat(index)],
            of_rows(self.support, self.sequences, index),
        )


class Engine(Protocol):
    synced: Sync | None

    def sync(self, policy: Policy, step: int | None = None) -> None:
        """Sample from these weights from now on. `step`, which messages name, is what they are of:
        a policy moves between two steps only, so one that is here as of this step stays."""

    def generate(self, prompts: list[list[int]], samples: int, draws: Draws) -> Rollout: ...

    def rest(self) -> None:
        """Nothing is sampled before the next sync: give back the memory that can be."""


Draws = torch.Generator | Sequence[torch.Generator]
"""Randomness of all answers, or of each prompt's own: then they do not depend on their company."""


def drawn(draws: Draws, make: Callable[[int, torch.Generator], Tensor], count: int) -> Tensor:
    """make(rows, generator) for `count` rows of one generator, or for equal shares of several."""
    if isinstance(draws, torch.Generator):
        return make(count, draws)
    return torch.cat([make(count // len(draws), each) for each in draws])


class LogprobMismatch(RuntimeError):
    """The engine did not sample from the policy that is being trained."""


MEAN, SHARE = 0.05, 0.01
"""The engine is another one when the mean difference is over MEAN times the bound, or this SHARE of
tokens differ by more than the bound. One token of ten thousand may: between vLLM and a bfloat16
trainer the largest of 3,916 tokens was 0.48 nats, of the trainer and itself, batched otherwise,
0.66 (huggingface/trl#6789)."""


def check_logprobs(
    rollout: Rollout,
    logprobs: Tensor,  # (n) ours
    bound: float,
    sync: Sync | None = None,
) -> dict[str, float]:
    """How far the engine's log-probabilities are from ours; raises where they are another policy's.

    An engine with stale weights, another temperature or a cut vocabulary trains without a word and
    to no good: this is where it is seen. `sync` is how the engine came by its weights.
    """
    difference = (rollout.logprobs - logprobs).abs().nan_to_num(torch.inf)
    beyond = (difference > bound).double()
    largest, mean, share = torch.stack(
        [difference.max().double(), difference.double().mean(), beyond.mean()]
    ).tolist()
    if mean > MEAN * bound or share > SHARE:
        worst = int(difference.argmax())
        answer = int(rollout.sequences.sequence_of[worst])
        step = worst - int(rollout.sequences.answer_starts[answer])
        raise LogprobMismatch(
            f"rollout.logprob_bound={bound:g}: the engine's log-probabilities and the trainer's "
            f"differ by {mean:.3g} on average, {share:.1%} of tokens by more than the bound, one "
            f"by {largest:.3g} (answer {answer}, token {step}: "
            f"{float(rollout.logprobs[worst]):.4f} against {float(logprobs[worst]):.4f}); the "
            "engine does not sample from the policy that is trained"
            + (f": look at {sync}" if sync else "")
        )
    return {"rollout/logprob_diff_max": largest, "rollout/logprob_diff_mean": mean}


def importance_weights(
    rollout: Rollout, logprobs: Tensor, kind: str, cap: float, beyond: str
) -> tuple[Tensor | None, dict[str, float]]:
    """(n) factors of the policy loss, ours / the engine's probability, and metrics. One over `cap`
    becomes `cap` (truncated importance sampling), or with `beyond` mask 0 (masked).

    Answers come from the engine's distribution, whose rounding is not the trainer's. `token` weighs
    each token by its own ratio, `sequence` a whole answer by the product of its tokens' ratios;
    None for `none`. Constants to autograd.
    """
    if kind == "none":
        return None, {}
    log_ratio = (logprobs - rollout.logprobs).double()
    if kind == "sequence":
        log_ratio = rollout.sequences.sums(log_ratio)
    ratio = log_ratio.exp()
    weights = ratio.masked_fill(ratio > cap, 0) if beyond == "mask" else ratio.clamp(max=cap)
    metrics = {
        "importance/mean": float(weights.mean()),
        "importance/capped": float((ratio >= cap).double().mean()),
        # 1: as good as samples of our own; 0.5: half of them are as good as lost
        "importance/effective": float(
            weights.sum() ** 2 / (len(weights) * weights.square().sum()).clamp(min=1e-300)
        ),
    }
    if kind == "sequence":
        weights = weights[rollout.sequences.sequence_of]
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
    kept: tuple[Tensor, Tensor] | None = None,  # row * limit + step, and an id that could be there
) -> Rollout:
    """Every rank's answers, on every rank."""
    tokens, logprobs, lengths, truncated = (
        parallel.all_sum(x) for x in (tokens, logprobs, lengths, truncated)
    )
    rows, sizes = tokens.cpu(), lengths.cpu()
    answers = [row[:length] for row, length in zip(rows.tolist(), sizes.tolist())]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    sequences = Sequences.of(repeated, answers, shared=samples > 1)
    flat = on_device(ranges(torch.arange(len(sizes)) * tokens.shape[1], sizes))
    support = None if kept is None else gathered_support(*kept)
    return Rollout(sequences, truncated.bool(), logprobs.flatten()[flat], support)
