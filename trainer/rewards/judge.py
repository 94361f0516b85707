"""Gold rewards by program, where there is a program that can judge: they never train anything."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.config import Config, Sources
from trainer.worlds import registry
from trainer.worlds.world import World


class Judge:
    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, prompts: list[Prompt], sequences: Sequences) -> Tensor:  # (S)
        gold = [self.world.gold(p.ids, answer) for p, answer in zip(prompts, sequences.answers())]
        return torch.tensor(gold, device=sequences.tokens.device)


def make_judge(config: Config, source: Sources) -> Judge | None:
    """Of prompts from this source, where it is a world."""
    return Judge(registry.world(source, config)) if registry.is_world(source) else None
