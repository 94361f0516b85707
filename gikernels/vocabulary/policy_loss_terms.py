"""The loss as both halves of linear_policy_loss see it: what tokens bring, and their slope."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gikernels import reference
from gikernels.backends import dispatch


class Tokens(NamedTuple):
    """What is known of each row beside its hidden state, (N) each."""

    targets: Tensor
    temperature: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    kl_coefs: Tensor | None = None  # beside the recipe's kl_coef, which is 1 then
    counts: Tensor | None = None  # bool, where rows that do not count could not be taken out

    def only_counting(self, slope: Tensor) -> Tensor:
        return slope if self.counts is None else slope.where(self.counts, 0)

    def rows(self, rows: slice | Tensor) -> Tokens:
        return Tokens._make(None if x is None else x[rows] for x in self)


class Recipe(NamedTuple):
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    def slope(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """d loss / d logprobs of each token, before the division by denom."""
        old, advantages = tokens.old_logprobs, tokens.advantages
        loss, ratio, clipped = reference.ppo_terms(
            logprobs, old, advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        slope = torch.where(clipped & ~loss.isnan(), 0, -ratio * advantages)
        if tokens.ref_logprobs is not None and self.kl_coef != 0:
            d = logprobs - tokens.ref_logprobs
            by_d = {"k1": torch.ones_like, "k2": lambda d: d, "k3": lambda d: -torch.expm1(-d)}
            by_row = 1 if tokens.kl_coefs is None else tokens.kl_coefs
            slope = slope + self.kl_coef * by_row * by_d[self.kl_estimator](d)
        return tokens.only_counting(slope)

    def entropy_slope(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """d loss / d entropy of each token, before the division by denom."""
        return tokens.only_counting(torch.full_like(logprobs, -self.entropy_coef))


def active_rows(slope: Tensor, recipe: Recipe) -> Tensor:
    """Indices of the rows that have a gradient: not those that are clipped or have no advantage.
    All of them while a CUDA graph is captured, as nobody may wait for their number."""
    if recipe.entropy_coef or dispatch.capturing(slope):
        return torch.arange(len(slope), device=slope.device)
    return (slope != 0).nonzero().squeeze(1)
