"""Scores on a scale that stays the same while the policy moves, and that one bad score cannot move.

The running mean and standard deviation are kept by magnitude: a row of (count, mean, squared
deviations) for each power of two, in float64. A reward function that once returns 1e20 lands in a
row of its own, where it is seen for what it is: few, and a thousand standard deviations away from
all the rest. Such rows are left out, for as long as that holds. So no score, however large, makes
the others vanish for good, and none is forgotten that turns out to be common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import parallel
from trainer.config import Config
from trainer.runs.console import say
from trainer.runs.faults import RunError

LOWEST, ROWS = -64, 256  # exponents -64 .. 191; float32 ends at 128, zero is in the lowest row
FAR = 1000.0
"""Standard deviations; further away and rare: left out."""
RARE = 1000
"""One in so many (or a single one) is rare."""
BOUND = 20.0
"""Standard deviations from the mean beyond which scores are as far, where prompts are compared."""


class Normaliser:
    """Divides by the running standard deviation of all scores so far, then clips."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows = torch.zeros(ROWS, 3, dtype=torch.float64)  # count, mean, squared deviations
        self.left_out = 0
        self._mean, self._std = 0.0, 1.0

    def observe(self, scores: Tensor) -> None:
        x = scores.detach().double().cpu()
        place = (torch.frexp(x).exponent.long() - LOWEST).clamp(0, ROWS - 1)
        place[x == 0] = 0
        count = torch.zeros(ROWS, dtype=torch.float64).index_add_(0, place, torch.ones_like(x))
        mean = torch.zeros_like(count).index_add_(0, place, x) / count.clamp(min=1)
        squares = torch.zeros_like(count).index_add_(0, place, (x - mean[place]).square())
        before, old_mean, old_squares = self.rows.unbind(1)
        both = (before + count).clamp(min=1)
        step = mean - old_mean
        self.rows = torch.stack(
            [
                before + count,
                old_mean + step * count / both,
                old_squares + squares + step.square() * before * count / both,
            ],
            1,
        )
        self._settle()

    def _settle(self) -> None:
        """Mean and standard deviation of what belongs together."""
        there = self.rows[:, 0].nonzero().flatten().tolist()
        total, out = float(self.rows[:, 0].sum()), 0.0
        self._mean, self._std = moments(self.rows[there])
        for at in range(len(there) - 1, 0, -1):  # from the largest magnitude down
            top, rest = self.rows[there[at]], self.rows[there[:at]]
            mean, std = moments(rest)
            out += float(top[0])
            if out > max(1.0, total / RARE):
                break
            if std > 0 and abs(float(top[1]) - mean) > FAR * std:
                self._mean, self._std = mean, std
                self._tell(int(out), abs(float(top[1])))
        if not torch.tensor([self._mean, self._std]).isfinite().all():
            raise RunError(
                f"reward: the scores' standard deviation is {self._std}, which nothing can be "
                "divided by: look at what the reward functions return"
            )

    def _tell(self, out: int, size: float) -> None:
        if out > self.left_out:
            say(
                f"reward: {out} of {int(self.rows[:, 0].sum())} scores, around {size:.3g}, more "
                f"than {FAR:g} standard deviations from the others: left out of their scale"
            )
        self.left_out = max(self.left_out, out)

    @property
    def mean(self) -> Tensor:  # ()
        return torch.tensor(self._mean, dtype=torch.float32, device=parallel.device())

    @property
    def std(self) -> Tensor:  # ()
        std = self._std if self._std > 0 else 1.0
        return torch.tensor(std, dtype=torch.float32, device=parallel.device())

    @property
    def scale(self) -> Tensor:  # () what scores are divided by
        return torch.ones_like(self.std) if self.config.reward.normalise == "none" else self.std

    def __call__(self, scores: Tensor) -> Tensor:
        if self.config.reward.normalise == "meanstd":
            scores = scores - self.mean
        scores = scores / self.scale
        clip = self.config.reward.clip
        return scores.clamp(-clip, clip) if clip else scores

    def bounded(self, scores: Tensor) -> Tensor:
        """For comparing prompts: one score of 1e20 would be its prompt's or group's for good."""
        reach = BOUND * self.std
        return torch.minimum(torch.maximum(scores, self.mean - reach), self.mean + reach)

    def state_dict(self) -> dict:
        return {"rows": self.rows, "left_out": self.left_out}

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.left_out = state["rows"], state["left_out"]
        if not bool(self.rows.isfinite().all()):
            raise RunError("reward: the checkpoint's statistics of scores are not finite")
        self._settle()


def moments(rows: Tensor) -> tuple[float, float]:  # (R, 3)
    """Mean and standard deviation of all that these rows have counted."""
    count, means, squares = rows.unbind(1)
    n = float(count.sum())
    mean = float((count * means).sum()) / n if n else 0.0
    spread = float((squares + count * (means - mean).square()).sum())
    return mean, (spread / max(n - 1, 1)) ** 0.5
