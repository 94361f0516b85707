"""pass@k and its interval, against all subsets and against counting."""

import itertools
import math
import random

import pytest

from trainer.ppo import passes


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right, k):
    answers = [True] * right + [False] * (5 - right)
    subsets = list(itertools.combinations(answers, k))
    assert passes.pass_at(k, right, 5) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval_of_right_and_wrong_is_wilsons():
    low, high = passes.interval([1.0] * 5 + [0.0] * 5)
    z = 1.959964
    centre, half = 0.5, z * math.sqrt(0.25 / 10 + z * z / 400) / (1 + z * z / 10)
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert passes.interval([0.0] * 8) == pytest.approx((0, z * z / (8 + z * z)), abs=1e-9)
    assert passes.interval([1.0] * 8) == pytest.approx((8 / (8 + z * z), 1), abs=1e-9)


@pytest.mark.parametrize("samples", [1, 4])
def test_it_covers_the_truth_19_times_in_20(samples):
    """Prompts of different difficulty, several answers to each: they are not independent."""
    draw, covered, trials = random.Random(0), 0, 600
    for _ in range(trials):
        shares = []
        for _ in range(80):
            difficulty = draw.random()
            shares.append(sum(draw.random() < difficulty for _ in range(samples)) / samples)
        low, high = passes.interval(shares)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / trials <= 0.98


def test_by_label_and_of_all():
    right = [True, False, True, True, False, False]
    bad = [False, True, False, False, False, False]
    got = passes.metrics(right, bad, 2, ["a", "b", None], "domain", "eval/")
    assert got["domain/a/pass@1"] == 0.5 and got["domain/a/pass@2"] == 1
    assert got["domain/a/malformed"] == 0.5 and got["domain/b/pass@1"] == 1
    assert got["eval/pass@1"] == 0.5 and got["eval/pass@2"] == pytest.approx(2 / 3)
    assert got["eval/pass@1_low"] < 0.5 < got["eval/pass@1_high"]
    one = passes.metrics([True], [False], 1, ["a"], "ood", "eval/ood_")
    assert set(one) == {
        f"{where}{name}"
        for where in ("ood/a/", "eval/ood_")
        for name in ("pass@1", "pass@1_low", "pass@1_high", "malformed")
    }
