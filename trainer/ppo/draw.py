"""x ~ D: which prompts an iteration answers, and the policy's answers to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.order import batch_of
from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.ppo.build import Setup
from trainer.rollout.engine import Rollout
from trainer.runs.loop import Metrics


@dataclass(frozen=True)
class Answers:
    """S answers, those to one prompt side by side."""

    chosen: list[int]
    """Places of the prompts among the run's, each once."""
    prompts: list[Prompt]
    """One an answer."""
    rollout: Rollout

    @property
    def sequences(self) -> Sequences:
        return self.rollout.sequences

    @property
    def samples(self) -> int:
        """Of each prompt."""
        return len(self.prompts) // len(self.chosen)

    @property
    def tokens(self) -> int:
        return int(self.sequences.lengths.sum())

    def metrics(self) -> Metrics:
        return {
            "rollout/length": float(self.sequences.answer_lengths.double().mean()),
            "rollout/truncated": float(self.rollout.truncated.double().mean()),
        }


def draw(t: Setup, step: int) -> list[int]:
    """Places of this step's prompts: the next ones, or those of a pool that the groups ask for."""
    ppo, groups, seed = t.config.ppo, t.signals.groups, t.config.run.seed
    if not focused(t, step):
        return batch_of(t.prompts, ppo.prompts_per_step, step, seed, "ppo")
    pool = t.signals.asked.pool(step)
    logits = None
    if groups.has_head:
        logits = t.signals.asked.ask(pool, step, lambda new: judged(t, new))
    weights = groups.drawing_weights(logits, [t.prompts[i] for i in pool])
    taken = torch.multinomial(
        weights.cpu(), ppo.prompts_per_step, generator=parallel.generator(seed, "draw", step)
    )
    return [pool[i] for i in taken.tolist()]


def judged(t: Setup, places: list[int]) -> Tensor:
    """(places, M): what the head says of these prompts. It reads a prompt's last token, and a first
    token of an answer, which nobody reads, stands for the answer."""
    end = [t.tokenizer.eos_token_id]
    return t.group_logits(Sequences.of([t.prompts[i].ids for i in places], [end] * len(places)))


def focused(t: Setup, step: int) -> bool:
    """Whether the head, once it has learnt something, chooses the prompts."""
    return (
        bool(t.config.groups.focus)
        and t.signals.groups.num > 1
        and step >= t.config.ppo.critic_warmup_steps
    )


def sample(t: Setup, chosen: list[int], step: int) -> Answers:
    """y ~ pi, by the engine as it is in sync; it rests afterwards."""
    samples, unique = t.config.ppo.samples_per_prompt, [t.prompts[i] for i in chosen]
    draws = parallel.generator(t.config.run.seed, "rollout", step)
    rollout = t.actors.engine.generate([p.ids for p in unique], samples, draws)
    t.actors.engine.rest()
    return Answers(chosen, [p for p in unique for _ in range(samples)], rollout)
