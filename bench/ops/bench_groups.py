"""`groups` and its peers: `pytest bench/ops/bench_groups.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("groups"))
def test_groups(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
