"""`linear_logprobs` and its peers: `pytest bench/ops/bench_linear_logprobs.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_logprobs"))
def test_linear_logprobs(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("linear_logprobs_support"))
def test_linear_logprobs_support(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
