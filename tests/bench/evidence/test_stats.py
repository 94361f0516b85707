"""Intervals cover as often as they say, groups agree as sklearn says, verdicts follow."""

import math

import numpy as np
import pytest

from bench.evidence import claims, stats
from bench.evidence.stats import Interval, interval


def test_t_quantiles_and_interval():
    for df, want in ((1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227), (1000, 1.96234)):
        assert stats.t_quantile(0.975, df) == pytest.approx(want, rel=1e-5)
    seen = interval([1.0, 2.0, 3.0])
    assert (seen.mean, seen.n) == (2, 3)
    assert seen.low == pytest.approx(2 - 4.30265 / 3**0.5, rel=1e-5)
    assert seen.bootstrap == pytest.approx((1, 3), abs=0.4)
    alone = interval([0.5])
    assert alone.mean == 0.5 and np.isnan(alone.low)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = [abs(s.mean) <= s.half for s in map(interval, random.standard_normal((400, 4)))]
    assert 0.92 < np.mean(hits) < 0.98


def test_adjusted_mutual_information():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for groups, domains in ((2, 4), (4, 4), (3, 2)):
        domain = random.integers(0, domains, 90)
        group = np.where(random.random(90) < 0.4, domain % groups, random.integers(0, groups, 90))
        ours = stats.adjusted_mutual_information(stats.contingency(group, domain))
        assert ours == pytest.approx(sklearn.adjusted_mutual_info_score(domain, group), abs=1e-9)


def test_adjusted_mutual_information_at_its_ends():
    assert stats.adjusted_mutual_information(np.diag([5, 7, 9])) == pytest.approx(1)
    assert stats.adjusted_mutual_information(np.array([[9, 3, 6]])) == 0
    independent = stats.adjusted_mutual_information(np.full((2, 4), 25))
    assert independent == pytest.approx(0, abs=0.01) and independent < 0


def test_win_rates_count_ties_half_and_their_interval_holds_the_truth():
    ours, theirs = np.array([[1.0, 0.5, 0.2, 0.0]]), np.array([[0.0, 0.5, 0.6, 0.0]])
    seen = stats.win_rate([(ours, theirs)])
    assert (seen.wins, seen.ties, seen.losses, seen.rate) == (0.25, 0.5, 0.25, 0.5)
    random = np.random.default_rng(0)
    pairs = [(random.random((2, 300)) + 0.2, random.random((2, 300))) for _ in range(4)]
    truth = 1 - 0.8**2 / 2
    better = stats.win_rate(pairs)
    assert better.low < truth < better.high and better.high - better.low < 0.1
    same = stats.win_rate([(random.random((2, 300)), random.random((2, 300))) for _ in range(4)])
    assert same.low < 0.5 < same.high


def test_curves():
    assert stats.interpolate(0.3, [0.8, 0.0, 0.4], [8, 0, 4]) == pytest.approx(3)
    assert stats.interpolate(2.0, [0.8, 0.0], [8, 0]) == 8
    assert stats.noise_about_running_mean([2.0] * 20) == 0
    line = stats.noise_about_running_mean(np.arange(40) / 40)
    rough = stats.noise_about_running_mean(np.arange(40) / 40 + 0.1 * (-1) ** np.arange(40))
    assert line < 1e-3 < 5e-3 < rough
    assert stats.collapses([0.5, 0.6, 0.45, 0.4, 0.58, 0.45, 0.7]) == 2
    assert stats.collapses([0.5, 0.6, 0.55, 0.7]) == 0
    assert stats.correlation([0, 1, 0, 1], [1, 3, 1, 3]) == pytest.approx(1)
    assert stats.correlation([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("want", "low", "high", "verdict"),
    [
        ("above", 0.01, 0.2, claims.HOLDS),
        ("above", -0.2, -0.01, claims.OPPOSITE),
        ("above", -0.01, 0.015, claims.SAME),
        ("above", -0.01, 0.2, claims.UNDECIDED),
        ("below", -0.2, -0.01, claims.HOLDS),
        ("below", 0.01, 0.2, claims.OPPOSITE),
        ("not below", -0.01, 0.2, claims.HOLDS),
        ("not below", -0.03, 0.2, claims.UNDECIDED),
        ("not below", -0.2, -0.03, claims.OPPOSITE),
    ],
)
def test_the_verdict_follows_from_the_interval(want, low, high, verdict):
    seen = Interval((low + high) / 2, low, high, (low, high), 8)
    assert claims.verdict(want, seen, gold=True) == verdict


def test_no_verdict_without_an_interval():
    assert claims.verdict("above", None, gold=True) == claims.NO_DATA
    assert claims.verdict("above", interval([1.0]), gold=True) == claims.ONE_SEED
    narrow = Interval(0.0, -0.001, 0.001, (0, 0), 8)
    assert claims.verdict("above", narrow, gold=False) == claims.UNDECIDED


def test_so_many_seeds_would_tell():
    seen = interval([0.05, -0.01, 0.03, 0.04, -0.02])
    assert claims.verdict("above", seen, True) == claims.UNDECIDED
    needed = claims.seeds_needed(seen)
    spread = seen.half * math.sqrt(5) / stats.t_quantile(0.975, 4)

    def half(n):
        return stats.t_quantile(0.975, n - 1) * spread / math.sqrt(n)

    assert needed > 5 and half(needed) < seen.mean <= half(needed - 1)
    assert claims.seeds_needed(interval([0.05, -0.05, 1e-9])) is None
