"""Group-invariant weights for somebody else's trainer: scores in, a weight a sequence out.

`trainer/` learns a head that predicts the groups. Here there is no critic to put it on, so the
groups are those of the exact partition of the batch itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import gikernels
from gikernels.backends import checks


class InferredGroups(NamedTuple):
    group_ids: Tensor  # (S) int64, 0 is the hardest; -1 where nothing was inferred
    weights: Tensor  # (S), multiplies the sequence's advantage
    kl_scale: Tensor  # (S), multiplies the sequence's KL coefficient
    metrics: dict[str, float]  # group/...


@dataclass(frozen=True, kw_only=True)
class GroupInvariance:
    """Hard groups weigh more and are held less tightly to the reference policy.

        group = partition(mean performance of each prompt's samples, num_groups)
        weight = group_weights(one_hot(group), performance / std, beta)
        kl_scale = kl_floor + (1 - kl_floor) * [group is the easiest]

    A prompt's samples share a group: it then tells of the task, not of the luck of one answer, and
    the weight is a constant within the baseline of GRPO and RLOO.
    """

    num_groups: int = 2
    """How many groups; 2 in the paper."""
    beta: float = 0.25
    """Strength of the weights, per standard deviation of performance; 0 is off."""
    form: str = "mass"
    """Which variance: mass, uniform or one_sided."""
    clamp: tuple[float, float] = (0.0, 5.0)
    """Bounds of a weight, so that no group is actively unlearned."""
    kl_floor: float = 0.5
    """Share of the KL coefficient that groups below the easiest keep; 1 is off. Much lower, and the
    policy exploits the reward model where that is weakest (docs/evidence.md)."""
    min_size: int = 1
    """Least number of prompts in a group."""

    def __post_init__(self) -> None:
        checks.whole("num_groups", self.num_groups, at_least=2)
        checks.number("beta", self.beta, at_least=0)
        checks.one_of("form", self.form, ("mass", "uniform", "one_sided"))
        checks.number("clamp[0]", self.clamp[0], at_most=self.clamp[1])
        checks.number("kl_floor", self.kl_floor, at_least=0, at_most=1)
        checks.whole("min_size", self.min_size, at_least=1)

    def infer(
        self,
        performance: Tensor,  # (S), comparable across prompts; NaN: was not scored
        prompt_group: Tensor | None = None,  # (S) ints, equal for samples of one prompt
    ) -> InferredGroups:
        """Of the GLOBAL batch: gather over ranks first, then all ranks infer the same."""
        checks.dims("performance", checks.floats("performance", performance), 1, "one a sequence")
        if prompt_group is None:
            prompt_group = torch.arange(len(performance), device=performance.device)
        checks.ints("prompt_group", prompt_group)
        checks.shape("prompt_group", prompt_group, tuple(performance.shape), "that of performance")

        performance = performance.detach().double()
        scored = ~performance.isnan()
        r = performance[scored]
        prompts, prompt = prompt_group[scored].unique(return_inverse=True)
        ones = torch.ones_like(performance)
        group_ids = torch.full_like(performance, -1, dtype=torch.long)
        untouched = InferredGroups(group_ids, ones.float(), ones.float(), {"group/inferred": 0.0})
        if len(prompts) < self.num_groups:
            return untouched
        means = gikernels.group_stats(r, prompt, len(prompts)).mean
        if not separable(means, self.num_groups, self.min_size):
            return untouched
        groups = gikernels.partition(means, self.num_groups, min_size=self.min_size)
        ids = groups.group_ids.long()[prompt]
        probs = torch.nn.functional.one_hot(ids, self.num_groups).double()
        # In standard deviations, so that beta means the same whatever the reward's scale.
        normalised = (r - r.mean()) / r.std(correction=0)
        weights, kl_scale = ones.clone(), ones.clone()
        weights[scored] = gikernels.group_weights(
            probs, normalised, self.beta, form=self.form, clamp=self.clamp
        ).double()
        kl_scale[scored] = self.kl_floor + (1 - self.kl_floor) * probs[:, -1]
        group_ids[scored] = ids
        metrics = self._metrics(r, ids, weights[scored], kl_scale[scored])
        return InferredGroups(group_ids, weights.float(), kl_scale.float(), metrics)

    def _metrics(self, r: Tensor, ids: Tensor, weights: Tensor, kl_scale: Tensor) -> dict:
        stats = gikernels.group_stats(r, ids, self.num_groups)
        mass = stats.count / len(r)
        lo, hi = self.clamp
        metrics = {
            "group/inferred": 1.0,
            "group/gap": (stats.mean[-1] - stats.mean[0]).item(),
            "group/variance": (mass * (stats.mean - r.mean()).square()).sum().item(),
            "group/worst": stats.mean[0].item(),
            "group/weight_clamped": ((weights <= lo) | (weights >= hi)).double().mean().item(),
        }
        for g in range(self.num_groups):
            member = ids == g
            metrics[f"group/{g}/score"] = stats.mean[g].item()
            metrics[f"group/{g}/mass"] = mass[g].item()
            metrics[f"group/{g}/weight"] = weights[member].mean().item()
            metrics[f"group/{g}/kl_scale"] = kl_scale[member].mean().item()
        return metrics


def separable(values: Tensor, num_groups: int, min_size: int) -> bool:
    """Whether num_groups groups of min_size exist: fill them greedily, ties together."""
    groups = size = 0
    for count in values.unique(return_counts=True)[1].tolist():
        size += count
        if size >= min_size:
            groups, size = groups + 1, 0
    return groups >= num_groups
