"""`linear_divergence` and its peers: `pytest bench/ops/bench_divergence.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_divergence"))
def test_linear_divergence(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
