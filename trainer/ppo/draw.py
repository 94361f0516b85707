"""x ~ D: which prompts an iteration answers, and the policy's answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.order import batch_of
from trainer.batch.sequences import Sequences, on_device
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
    raw: dict[str, Tensor] | None = None
    """(S) each: what they scored, where that had to be known to take them."""
    generated: int = 0
    """Tokens sampled for this, those of answers that were not taken among them."""
    dropped: int = 0
    """Prompts that were not taken for how their answers scored."""

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
            "rollout/dropped": self.dropped,
        }


def draw(t: Setup, step: int) -> list[int]:
    """Places of this step's prompts: the next ones, or those of a pool that the groups ask for."""
    ppo, groups, seed = t.config.ppo, t.signals.groups, t.config.run.seed
    if not chooses(t, step):
        return as_they_come(t, step)
    pool = t.signals.asked.pool(step)
    logits = None
    if groups.has_head:
        logits = t.signals.asked.ask(pool, step, partial(judged, t))
    # Read only where groups are told by the prompts themselves: a pool is thousands of rows.
    weights = groups.drawing_weights(logits, map(t.prompts.__getitem__, pool))
    taken = torch.multinomial(
        weights.cpu(), ppo.prompts_per_step, generator=parallel.generator(seed, "draw", step)
    )
    return [pool[i] for i in taken.tolist()]


def as_they_come(t: Setup, step: int, again: int = 0) -> list[int]:
    """The next prompts; with draw=dynamic each step has room to ask for more of them."""
    rounds = t.config.groups.draw_rounds if t.config.groups.draw == "dynamic" else 1
    size, place = t.config.ppo.prompts_per_step, step * rounds + again
    return batch_of(t.prompts, size, place, t.config.run.seed, "ppo")


def judged(t: Setup, places: list[int]) -> Tensor:
    """(places, M): what the head says of these prompts. It reads a prompt's last token, and a first
    token of an answer, which nobody reads, stands for the answer."""
    end = [t.tokenizer.eos_token_id]
    return t.group_logits(Sequences.of([t.prompts[i].ids for i in places], [end] * len(places)))


def chooses(t: Setup, step: int) -> bool:
    """Whether the groups, once their head has learnt something, choose the prompts."""
    return (
        t.config.groups.choose
        and t.signals.groups.num > 1
        and step >= t.config.ppo.critic_warmup_steps
    )


def sample(t: Setup, chosen: list[int], step: int) -> Answers:
    """y ~ pi, by the engine as it is in sync; it rests afterwards."""
    if t.config.groups.draw == "dynamic":
        answers = varied(t, chosen, step)
    else:
        answers = answered(t, chosen, "rollout", step)
    t.actors.engine.rest()
    return answers


def answered(t: Setup, chosen: list[int], *draws: object) -> Answers:
    samples, unique = t.config.ppo.samples_per_prompt, [t.prompts[i] for i in chosen]
    generator = parallel.generator(t.config.run.seed, *draws)
    rollout = t.actors.engine.generate([p.ids for p in unique], samples, generator)
    prompts = [p for p in unique for _ in range(samples)]
    return Answers(chosen, prompts, rollout, generated=rollout.sequences.count)


def varied(t: Setup, chosen: list[int], step: int) -> Answers:
    """Dynamic sampling (arXiv 2503.14476): answers that all score the same say nothing of which is
    better, so their prompt makes way for another one. After `draw_rounds` rounds what there is of
    such prompts fills the step."""
    rounds, samples = t.config.groups.draw_rounds, t.config.ppo.samples_per_prompt
    wanted = len(chosen)
    parts: list[Answers] = []
    scores: list[dict[str, Tensor]] = []
    differ = torch.zeros(0, dtype=torch.bool)
    for again in range(rounds):
        places = as_they_come(t, step, again) if again else chosen
        answers = answered(t, places, "rollout", step, *([again] if again else []))
        rollout = answers.rollout
        raw = t.signals.scorer(answers.prompts, rollout.sequences, rollout.truncated)
        each = raw["total"].view(-1, samples)
        parts.append(answers)
        scores.append(raw)
        differ = torch.cat([differ, (each != each[:, :1]).any(1).cpu()])
        if int(differ.sum()) >= wanted:
            break
    order = torch.cat([differ.nonzero().flatten(), (~differ).nonzero().flatten()])
    taken = order[:wanted].sort().values
    rows = (taken.unsqueeze(1) * samples + torch.arange(samples)).flatten()
    every = [place for part in parts for place in part.chosen]
    prompts = [prompt for part in parts for prompt in part.prompts]
    return Answers(
        [every[i] for i in taken.tolist()],
        [prompts[i] for i in rows.tolist()],
        Rollout.joined([part.rollout for part in parts]).rows(rows),
        {name: torch.cat([raw[name] for raw in scores])[on_device(rows)] for name in scores[0]},
        sum(part.generated for part in parts),
        len(every) - wanted,
    )
