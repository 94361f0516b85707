"""Which answers are right, where that can be said exactly, and which do not even look like one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.config.rewards import ChoiceReward, MathReward, RewardFunction
from trainer.rewards import maths, rules
from trainer.rewards.judge import TextJudge, TokenJudge

EXACT = ("math", "choice", "verifier")
"""Reward functions by name that say right or wrong."""


class Exact(NamedTuple):
    right: Tensor  # (S) bool
    malformed: Tensor  # (S) bool: cut off, or nothing that could be an answer


def exact(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    judge: TokenJudge | TextJudge | None,
    prompts: list[Prompt],
    sequences: Sequences,
    truncated: Tensor,  # (S) bool
    columns: dict[str, Tensor],  # (S) each: gold where there is a judge, and scores by function
) -> Exact | None:
    """By the judge's gold, or else by the first reward function that says right or wrong; None
    where there is neither. 1 is right."""
    if isinstance(judge, TokenJudge):  # gold is a matter of degree there
        return None
    if isinstance(judge, TextJudge):
        malformed = truncated | ~judge.well_formed(prompts, sequences)
        return Exact(columns["gold"] >= 1, malformed)
    entry = next((each for each in config.reward.functions if each.function in EXACT), None)
    if entry is None:
        return None
    texts = tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
    bad = torch.tensor([not _readable(entry, text) for text in texts], device=truncated.device)
    right = columns[entry.label] >= 1
    return Exact(right, (bad | truncated) & ~right)


def _readable(entry: RewardFunction, text: str) -> bool:
    """Whether there is an answer in it, for this function."""
    if isinstance(entry, MathReward):
        return maths.number(text) is not None
    if isinstance(entry, ChoiceReward):
        return rules.chosen(text, entry.letters) is not None
    return text.strip() != ""
