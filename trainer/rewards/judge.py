"""Gold rewards by program, where there is a program that can judge.

Those of the toy world never train anything; that of the reasoning world is what `verifier` rewards.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.config import Config, Sources
from trainer.worlds import registry
from trainer.worlds.world import TextWorld, World


class Judge(Protocol):
    def __call__(self, prompts: list[Prompt], sequences: Sequences) -> Tensor: ...  # (S)


class TokenJudge:
    """Of a world that reads token ids."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, prompts: list[Prompt], sequences: Sequences) -> Tensor:  # (S)
        gold = [self.world.gold(p.ids, answer) for p, answer in zip(prompts, sequences.answers())]
        return torch.tensor(gold, device=parallel.device())


class TextJudge:
    """Of a world that reads texts, and the row that a prompt came from."""

    def __init__(self, world: TextWorld, tokenizer: PreTrainedTokenizerBase) -> None:
        self.world, self.tokenizer = world, tokenizer

    def __call__(self, prompts: list[Prompt], sequences: Sequences) -> Tensor:  # (S)
        texts = self.tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
        gold = [self.world.gold(p.meta, text) for p, text in zip(prompts, texts)]
        return torch.tensor(gold, device=parallel.device())

    def well_formed(self, prompts: list[Prompt], sequences: Sequences) -> Tensor:  # (S) bool
        texts = self.tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
        good = [self.world.well_formed(p.meta, text) for p, text in zip(prompts, texts)]
        return torch.tensor(good, device=parallel.device())


def make_judge(
    config: Config, source: Sources, tokenizer: PreTrainedTokenizerBase
) -> TokenJudge | TextJudge | None:
    """Of prompts from this source, where it is a world."""
    if registry.has_ids(source):
        return TokenJudge(registry.world(source, config))
    if registry.is_text_world(source):
        return TextJudge(registry.text_world(source, config), tokenizer)
    return None
