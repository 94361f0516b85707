"""`group_advantages` and its peers: `pytest bench/ops/bench_group_advantages.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("group_advantages"))
def test_group_advantages(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
