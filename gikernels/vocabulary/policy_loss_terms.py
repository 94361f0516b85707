"""The loss as both halves of linear_policy_loss see it: what tokens bring, and their slope."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gikernels import reference
from gikernels.backends import dispatch

METRICS = ("policy", "ratio", "clipfrac", "approxkl", "entropy", "kl")


class Tokens(NamedTuple):
    """What is known of each row beside its hidden state, (N) each."""

    targets: Tensor
    temperature: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    kl_coefs: Tensor | None = None  # beside the recipe's kl_coef, which is 1 then
    counts: Tensor | None = None  # bool, where rows that do not count could not be taken out
    weights: Tensor | None = (
        None  # where rows have denominators of their own: one less than the op's
    )

    def weighted(self, x: Tensor) -> Tensor:
        """Something of each row, as it counts in a sum that is divided by denom."""
        x = x if self.counts is None else x.where(self.counts, 0)
        return x if self.weights is None else x * self.weights

    def rows(self, rows: slice | Tensor) -> Tokens:
        return Tokens._make(None if x is None else x[rows] for x in self)


class Recipe(NamedTuple):
    loss: str  # "ppo" or "cispo"
    kl_estimator: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    cap_low: float
    cap_high: float
    kl_coef: float
    entropy_coef: float

    def terms(self, logprobs: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ratio, and whether a clip or cap is in force, of each token."""
        rows = (logprobs, tokens.old_logprobs, tokens.advantages)
        if self.loss == "cispo":
            return reference.cispo_terms(*rows, self.cap_low, self.cap_high)
        return reference.ppo_terms(*rows, self.clip_low, self.clip_high, self.dual_clip)

    def slope(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """d loss / d logprobs of each token, before the division by denom."""
        loss, ratio, held = self.terms(logprobs, tokens)
        if self.loss == "cispo":  # what the loss multiplies log-probabilities by
            slope = -ratio.clamp(self.cap_low, self.cap_high) * tokens.advantages
        else:
            slope = torch.where(held & ~loss.isnan(), 0, -ratio * tokens.advantages)
        if tokens.ref_logprobs is not None and self.kl_coef != 0:
            d = logprobs - tokens.ref_logprobs
            by_d = {"k1": torch.ones_like, "k2": lambda d: d, "k3": lambda d: -torch.expm1(-d)}
            by_row = 1 if tokens.kl_coefs is None else tokens.kl_coefs
            slope = slope + self.kl_coef * by_row * by_d[self.kl_estimator](d)
        return tokens.weighted(slope)

    def entropy_slope(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """d loss / d entropy of each token, before the division by denom."""
        return tokens.weighted(torch.full_like(logprobs, -self.entropy_coef))

    def total(
        self, logprobs: Tensor, entropy: Tensor, tokens: Tokens, denom: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and METRICS stacked: a few vectors."""

        def mean(x: Tensor) -> Tensor:
            return tokens.weighted(x).sum() / denom

        policy, ratio, held = self.terms(logprobs, tokens)
        back = reference.kl_estimate(tokens.old_logprobs - logprobs, "k3")
        values = [mean(x) for x in (policy, ratio, held.to(ratio.dtype), back, entropy)]
        loss = values[0] - self.entropy_coef * values[-1]
        if tokens.ref_logprobs is not None:
            kl = reference.kl_estimate(logprobs - tokens.ref_logprobs, self.kl_estimator)
            values.append(mean(kl))
            cost = kl if tokens.kl_coefs is None else kl * tokens.kl_coefs
            loss = loss + self.kl_coef * mean(cost)
        return loss, torch.stack(values)


def active_rows(slope: Tensor, recipe: Recipe) -> Tensor:
    """Indices of the rows that have a gradient: not those that are clipped or have no advantage.
    All of them while a CUDA graph is captured, as nobody may wait for their number."""
    if recipe.entropy_coef or dispatch.capturing(slope):
        return torch.arange(len(slope), device=slope.device)
    return (slope != 0).nonzero().squeeze(1)
