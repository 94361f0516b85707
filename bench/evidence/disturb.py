"""What the section on robustness does to a run: wrong rewards, wrong groups.

Reward functions are named in an arm's settings and added to the reward model's score. Whatever is
random about them is a function of prompt and answer: the same answer always scores the same, as
with a reward model that is wrong, and a rerun gives the same figures. The reward model's own scores
spread by about 0.3 in the toy world.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

NOISE = 0.3
OUTLIERS, OUTLIER = 0.05, 3.0
"""Share of the answers, and what is added to or taken off their score."""


def noise(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
    return [NOISE * _random(pair).standard_normal() for pair in zip(prompts, answers)]


def outliers(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
    def one(pair: tuple[str, str]) -> float:
        random = _random(pair)
        hit = random.random() < OUTLIERS
        return OUTLIER * random.choice((-1.0, 1.0)) if hit else 0.0

    return [one(pair) for pair in zip(prompts, answers)]


def _random(names: Sequence[object]) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(tuple(names)).encode()))


def apply(disturbances: Mapping[str, float]) -> None:
    """Change the trainer of this process: no setting of it offers to be wrong."""
    for name, share in disturbances.items():
        {"wrong_group": wrong_group, "wrong_label": wrong_label}[name](share)


def wrong_group(share: float) -> None:
    """This share of prompts is always taken for the opposite: hard for easy, easy for hard."""
    from trainer.ppo.groups import Groups

    right = Groups.probs

    def probs(self, logits, prompts):
        prompts = list(prompts)
        out = right(self, logits, prompts)
        wrong = [_random((self.seed, tuple(p.ids))).random() < share for p in prompts]
        return torch.where(torch.tensor(wrong, device=out.device).unsqueeze(1), out.flip(1), out)

    Groups.probs = probs


def wrong_label(share: float) -> None:
    """This share of the labels that the head learns from is another group's, drawn anew."""
    from trainer.ppo.groups import Groups

    right = Groups.labels
    draws = np.random.default_rng(0)

    def labels(self, performance):
        out = right(self, performance)
        if out is None:
            return None
        wrong = torch.tensor(draws.random(len(out)) < share, device=out.device)
        other = torch.tensor(draws.integers(1, self.num, len(out)), device=out.device)
        return torch.where(wrong, (out + other) % self.num, out)

    Groups.labels = labels
