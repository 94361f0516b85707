"""`linear_gather_logprobs` and its peers: `pytest bench/ops/bench_gather_logprobs.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_gather_logprobs"))
def test_linear_gather_logprobs(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
