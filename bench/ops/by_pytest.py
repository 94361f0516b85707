"""The same cases for pytest-benchmark: `pytest bench/ops/bench_logprobs.py --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from bench.ops import calls, cases
from bench.ops.case import Case
from bench.ops.peers import Contender

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def everybody(op: str) -> list:
    """A parameter set for each case of this machine, each mode and each contender."""
    return [
        pytest.param(case, mode, contender, id=f"{case.label}-{mode}-{contender.name}")
        for case in cases.OPS[op](DEVICE.type.replace("cuda", "gpu"))
        for mode in case.work
        for contender in case.contenders
        if mode == cases.FORWARD or not contender.forward_only
    ]


def run(benchmark, case: Case, mode: str, contender: Contender) -> None:
    fn = calls.prepare(case, contender, case.shape, DEVICE, mode)
    try:
        fn()
    except Exception as error:
        pytest.skip(str(error))

    def synchronised() -> None:
        fn()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.label}, {mode}"
    benchmark.pedantic(synchronised, rounds=7, warmup_rounds=1)
    work = case.work[mode]
    benchmark.extra_info[f"{work.unit}/s"] = work.amount / benchmark.stats.stats.median
    benchmark.extra_info["formula"] = work.formula
