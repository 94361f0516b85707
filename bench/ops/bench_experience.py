"""`experience` and its peers: `pytest bench/ops/bench_experience.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("experience"))
def test_experience(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
