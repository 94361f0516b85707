"""`linear_policy_loss` and its peers: `pytest bench/ops/bench_policy_loss.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_policy_loss"))
def test_linear_policy_loss(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
