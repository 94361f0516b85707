"""pass@1 and pass@k: the share of prompts that some of k answers gets right, with 95 % intervals.

With n answers to a prompt, c of them right, 1 - C(n - c, k) / C(n, k) estimates without bias that
one of k is right (arXiv 2107.03374). Prompts are independent of each other, answers to one are not:
the interval is over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations


def pass_at(k: int, right: int, of: int) -> float:
    """Of one prompt, from `of` answers."""
    return 1 - math.comb(of - right, k) / math.comb(of, k)


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """Wilson's, for the mean of one share a prompt. It is made for right and wrong; where several
    answers make shares between, it takes as many prompts as their smaller spread is worth."""
    n = len(shares)
    mean = sum(shares) / n
    spread = sum((share - mean) ** 2 for share in shares) / n
    worth = n * mean * (1 - mean) / spread if spread > 0 and 0 < mean < 1 else n
    middle = (mean + Z * Z / (2 * worth)) / (1 + Z * Z / worth)
    root = math.sqrt(mean * (1 - mean) / worth + (Z / (2 * worth)) ** 2)
    half = Z / (1 + Z * Z / worth) * root
    return max(0.0, middle - half), min(1.0, middle + half)


def metrics(
    right: Sequence[bool],
    malformed: Sequence[bool],
    samples: int,
    labels: Sequence[str | None],
    prefix: str,
    whole: str,
) -> dict[str, float]:
    """Of answers that stand side by side, `samples` to each prompt; one label a prompt.

    {prefix/<label>/pass@1, .../pass@1_low, .../pass@1_high, .../malformed}, pass@k likewise, and
    the same of all prompts under `whole`.
    """
    counts = [sum(right[i : i + samples]) for i in range(0, len(right), samples)]
    bad = [sum(malformed[i : i + samples]) / samples for i in range(0, len(right), samples)]
    places: dict[str, list[int]] = {whole: list(range(len(counts)))}
    for i, label in enumerate(labels):
        if label is not None:
            places.setdefault(f"{prefix}/{label}/", []).append(i)
    out: dict[str, float] = {}
    for name, rows in places.items():
        for k in dict.fromkeys((1, samples)):
            shares = [pass_at(k, counts[i], samples) for i in rows]
            low, high = interval(shares)
            out[f"{name}pass@{k}"] = sum(shares) / len(shares)
            out[f"{name}pass@{k}_low"], out[f"{name}pass@{k}_high"] = low, high
        out[f"{name}malformed"] = sum(bad[i] for i in rows) / len(rows)
    return out
