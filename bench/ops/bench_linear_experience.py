"""`linear_experience` and its peers: `pytest bench/ops/bench_linear_experience.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_experience"))
def test_linear_experience(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
