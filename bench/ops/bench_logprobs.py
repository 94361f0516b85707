"""`logprobs` and its peers: `pytest bench/ops/bench_logprobs.py`."""

import pytest

from bench.ops import by_pytest


@pytest.mark.parametrize("case, mode, contender", by_pytest.everybody("logprobs"))
def test_logprobs(benchmark, case, mode, contender):
    by_pytest.run(benchmark, case, mode, contender)
