"""Intervals, win rates, agreement: each a plain function of numbers.

Everything is paired by seed: runs of one seed share SFT, reward model, prompts and random numbers,
and seeds differ by more than arms do. The interval that verdicts use is Student's; the bootstrap
over seeds stands beside it (with few seeds it is too narrow).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """Of a mean over seeds. With one seed there is no interval: low and high are not a number."""

    mean: float
    low: float
    high: float
    bootstrap: tuple[float, float]
    n: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    x = np.asarray(values, dtype=float)
    assert len(x) > 0 and np.isfinite(x).all()
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, math.nan, math.nan, (math.nan, math.nan), 1)
    half = t_quantile((1 + LEVEL) / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    draws = np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))
    return Interval(mean, mean - half, mean + half, percentiles(x[draws].mean(1)), len(x))


def percentiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def t_quantile(p: float, df: int) -> float:
    """Of Student's t, p > 1/2: where its distribution function, integrated by Simpson's rule in
    the angle atan(t / sqrt(df)), reaches p. cos^(df - 1) is all that is left of the density."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)

    def above_half(angle: float, pieces: int = 400) -> float:
        x = np.linspace(0, angle, 2 * pieces + 1)
        y = np.cos(x) ** (df - 1)
        total = y[0] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum() + y[-1]
        return scale * angle / (6 * pieces) * float(total)

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if above_half(middle) < p - 0.5:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan((low + high) / 2)


@dataclass(frozen=True)
class WinRate:
    """Wins plus half the ties, on the same prompts; the interval resamples seeds, then prompts."""

    rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float
    seeds: int


def win_rate(pairs: Sequence[tuple[np.ndarray, np.ndarray]], same: float = 1e-6) -> WinRate:
    """`pairs`: for each seed (ours, theirs), each (draws, prompts): gold of answers to the same
    prompts. Answers to one prompt stay together when prompts are resampled."""
    random = np.random.default_rng(0)
    resampled, shares = [], []
    for ours, theirs in pairs:
        difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
        tie = np.abs(difference) <= same
        won = np.where(tie, 0.5, (difference > 0) * 1.0).mean(0)  # (prompts)
        shares.append([(~tie & (difference > 0)).mean(), tie.mean()])
        resampled.append(won[random.integers(0, len(won), (2000, len(won)))].mean(1))
    wins, ties = np.mean(shares, axis=0)
    seeds = random.integers(0, len(pairs), (2000, len(pairs)))
    again = random.integers(0, 2000, seeds.shape)  # a seed drawn twice has other prompts each time
    low, high = percentiles(np.array(resampled)[seeds, again].mean(1))
    rate = float(wins + ties / 2)
    return WinRate(rate, low, high, float(wins), float(ties), float(1 - wins - ties), len(pairs))


def contingency(a: Sequence, b: Sequence) -> np.ndarray:
    """(labels of a, labels of b): how often each pair occurs."""
    rows = {label: i for i, label in enumerate(sorted(set(a)))}
    columns = {label: i for i, label in enumerate(sorted(set(b)))}
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for x, y in zip(a, b):
        table[rows[x], columns[y]] += 1
    return table


def adjusted_mutual_information(table: np.ndarray) -> float:
    """1: the same partition; 0: what chance gives to groups and domains of these sizes.

    (MI - E[MI]) / (mean of the entropies - E[MI]), the expectation over all tables with these
    margins (Vinh, Epps and Bailey 2010): each cell is hypergeometric.
    """
    table = np.asarray(table, dtype=np.int64)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    n, a, b = int(table.sum()), table.sum(1), table.sum(0)
    if len(a) == 1 or len(b) == 1:  # a partition into one part says nothing
        return 1.0 if len(a) == len(b) else 0.0
    log_factorial = np.array([math.lgamma(k + 1) for k in range(n + 1)])

    def information(cells, left, right):
        return cells / n * np.log(n * cells / (left * right))

    seen = table > 0
    mutual = information(table[seen], *(m[seen] for m in np.meshgrid(a, b, indexing="ij"))).sum()
    expected = 0.0
    for ai in a:
        for bj in b:
            k = np.arange(max(1, ai + bj - n), min(ai, bj) + 1)
            if len(k) == 0:
                continue
            log_p = (
                log_factorial[[ai, bj, n - ai, n - bj]].sum()
                - log_factorial[n]
                - log_factorial[k]
                - log_factorial[ai - k]
                - log_factorial[bj - k]
                - log_factorial[n - ai - bj + k]
            )
            expected += float((information(k, ai, bj) * np.exp(log_p)).sum())
    entropies = [-(m / n * np.log(m / n)).sum() for m in (a, b)]
    room = np.mean(entropies) - expected
    return float((mutual - expected) / room) if abs(room) > 1e-12 else 0.0


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one of them is constant."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The curve through (xs, ys) at x; at its ends it goes on level."""
    points = sorted(zip(xs, ys))
    return float(np.interp(x, [p[0] for p in points], [p[1] for p in points]))


def noise_about_running_mean(curve: Sequence[float], half: int = 4) -> float:
    """Variance of a curve about its centred running mean of 2 * half + 1 steps."""
    y = np.asarray(curve, dtype=float)
    means = [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))]
    return float(np.mean((y - np.array(means)) ** 2)) if len(y) else math.nan


def collapses(curve: Sequence[float], fall: float = 0.1) -> int:
    """How often the curve falls by more than `fall` below its best so far; it has to come back to
    within half of that before it can fall again."""
    best, down, count = -math.inf, False, 0
    for value in curve:
        best = max(best, value)
        if not down and value < best - fall:
            down, count = True, count + 1
        elif down and value > best - fall / 2:
            down = False
    return count
