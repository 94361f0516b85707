"""Gold rewards by program, where there is a program that can judge: they never train anything."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt


class Judge:
    """Gold rewards by program, where the data are the toy world's."""

    def __init__(self, config) -> None:
        from trainer.worlds.toy import World

        self.world = World(config.toy)

    def __call__(self, prompts: list[Prompt], sequences: Sequences) -> Tensor:  # (S)
        gold = [self.world.gold(p.ids, answer) for p, answer in zip(prompts, sequences.answers())]
        return torch.tensor(gold, device=sequences.tokens.device)


def make_judge(config, source: str) -> Judge | None:
    return Judge(config) if source == "toy" else None
