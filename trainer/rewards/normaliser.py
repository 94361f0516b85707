"""Scores on a scale that stays the same while the policy moves."""

from __future__ import annotations

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.config import Config


class Normaliser:
    """Divides by the running standard deviation of all scores so far, then clips."""

    def __init__(self, config: Config) -> None:
        self.config = config
        zero = torch.zeros(1, device=parallel.device())
        self.stats = gikernels.GroupStats(zero, zero, zero)

    def observe(self, scores: Tensor) -> None:
        ids = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
        self.stats = gikernels.merge_stats(self.stats, gikernels.group_stats(scores, ids, 1))

    @property
    def std(self) -> Tensor:  # ()
        count, _, m2 = (x[0] for x in self.stats)
        std = (m2 / (count - 1).clamp(min=1)).sqrt()
        return torch.where(std > 0, std, 1)

    @property
    def scale(self) -> Tensor:  # () what scores are divided by
        return torch.ones_like(self.std) if self.config.reward.normalise == "none" else self.std

    def __call__(self, scores: Tensor) -> Tensor:
        if self.config.reward.normalise == "meanstd":
            scores = scores - self.stats.mean[0]
        scores = scores / self.scale
        clip = self.config.reward.clip
        return scores.clamp(-clip, clip) if clip else scores

    def state_dict(self) -> dict:
        return {"stats": torch.stack(self.stats)}

    def load_state_dict(self, state: dict) -> None:
        self.stats = gikernels.GroupStats(*state["stats"])
