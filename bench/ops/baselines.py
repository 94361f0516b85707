"""What RLHF trainers run where gikernels has one launch, written plainly: the baselines to beat.

They follow the structure of the loops in use (verl's and TRL's): an op a time step, a Python
dictionary for the groups. They want finite numbers at masked places, as those do.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from gikernels.reference import Experience, kl_estimate


def experience_per_step(
    logprobs: Tensor,  # (S, T)
    ref_logprobs: Tensor,  # (S, T)
    values: Tensor,  # (S, T)
    scores: Tensor,  # (S)
    mask: Tensor,  # (S, T) bool
    kl_coef: float,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, one Python step a token, k1; normalised over the batch."""
    kl = ((logprobs - ref_logprobs) * mask).tolist()
    rows, value_rows, kept_rows = scores.tolist(), values.tolist(), mask.tolist()
    advantages = [[0.0] * len(row) for row in kl]
    for i, score in enumerate(rows):
        next_advantage = next_value = 0.0
        for t in reversed(range(len(kl[i]))):
            if not kept_rows[i][t]:
                continue
            reward = score - kl_coef * kl[i][t]
            score = 0.0
            delta = reward + gamma * next_value - value_rows[i][t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value_rows[i][t]
            advantages[i][t] = next_advantage
    result = torch.tensor(advantages, dtype=logprobs.dtype, device=logprobs.device)
    returns = (result + values) * mask
    return _whiten(result, mask), returns


def experience_columns(
    logprobs: Tensor,  # (S, T)
    ref_logprobs: Tensor,  # (S, T)
    values: Tensor,  # (S, T)
    scores: Tensor,  # (S)
    mask: Tensor,  # (S, T) bool
    kl_coef: float | Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    estimator: str = "k1",
    norm: str = "batch",
    group_ids: Tensor | None = None,
) -> Experience:
    """The same with a handful of tensor operations a time step, each on a column of S numbers."""
    keep = mask.to(logprobs.dtype)
    kl = kl_estimate(logprobs - ref_logprobs, estimator) * keep
    rewards = -(kl_coef.unsqueeze(1) if isinstance(kl_coef, Tensor) else kl_coef) * kl
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * steps).argmax(1)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    next_value = next_advantage = torch.zeros_like(scores)
    columns = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t] * keep[:, t] + (1 - keep[:, t]) * next_value
        next_advantage = advantage * keep[:, t] + (1 - keep[:, t]) * next_advantage
        columns.append(next_advantage)
    advantages = torch.stack(columns[::-1], 1) * keep
    returns = (advantages + values) * keep
    if norm == "batch":
        advantages = _whiten(advantages, mask)
    elif norm == "group":
        assert group_ids is not None
        advantages = whiten_groups(advantages, mask, group_ids)
    return Experience(rewards, kl, advantages, returns, kl.sum(1), rewards.new_zeros(1, 3))


def _whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    keep = mask.to(x.dtype)
    mean = (x * keep).sum() / keep.sum()
    variance = ((x - mean).square() * keep).sum() / keep.sum()
    return (x - mean) * torch.rsqrt(variance + eps) * keep


def whiten_groups(advantages: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """Token advantages (S, T) within the groups of their sequences, a dictionary of rows."""
    rows = defaultdict(list)
    for i, group in enumerate(group_ids.tolist()):
        rows[group].append(i)
    out = torch.zeros_like(advantages)
    for members in rows.values():
        out[members] = _whiten(advantages[members], mask[members])
    return out


def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO's (R - mean) / (std + eps), a dictionary of lists and a Python loop."""
    scores = defaultdict(list)
    for reward, group in zip(rewards, group_ids.tolist()):
        scores[group].append(reward)
    mean, std = {}, {}
    for group, members in scores.items():
        together = torch.stack(members)
        mean[group] = together.mean() if len(members) > 1 else together[0]
        std[group] = together.std() if len(members) > 1 else torch.zeros_like(together[0])
    out = torch.empty_like(rewards)
    for i, group in enumerate(group_ids.tolist()):
        out[i] = (rewards[i] - mean[group]) / (std[group] + eps)
    return out


def main() -> None:
    """Milliseconds of `experience` and of the loops, interleaved; S = T = 512, right padded."""
    import sys
    import time

    import gikernels as gk

    s = t = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    torch.manual_seed(0)
    logprobs, ref_logprobs, values = torch.randn(3, s, t).unbind()
    mask = torch.arange(t) < torch.randint(t // 2, t + 1, (s, 1))
    args = (logprobs, ref_logprobs, values, torch.randn(s), mask, 0.1)
    entries = {
        "gikernels": lambda: gk.experience(*args, norm="batch"),
        "columns": lambda: experience_columns(*args),
        "per step": lambda: experience_per_step(*args),
    }
    taken: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(21):
        for name, run in entries.items():
            if name == "per step" and turn % 4:
                continue
            start = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - start) * 1e3)
    ours = sorted(taken["gikernels"][1:])
    for name, times in taken.items():
        times = sorted(times[1:])
        low, middle = times[0], times[len(times) // 2]
        ratio = f"{low / ours[0]:.1f} / {middle / ours[len(ours) // 2]:.1f}"
        print(f"{name:10} min {low:8.3f}  median {middle:8.3f} ms  of ours {ratio}")


if __name__ == "__main__":
    main()
