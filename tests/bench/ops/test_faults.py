"""What may go wrong on a machine that is not this one, and must not end a benchmark."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from bench.host import machine
from bench.ops import calls, cases, measure, peers, timing, truth
from bench.ops.peers import Contender

CPU = torch.device("cpu")


def test_who_runs_out_of_memory_beside_the_others_leaves_and_they_go_on():
    """A contender may survive its trial and then meet the tensors of the rest."""
    calls_made = {"greedy": 0}

    def greedy(inputs):
        calls_made["greedy"] += 1
        if calls_made["greedy"] > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return peers.torch_group_stats(inputs)

    case = cases.find("groups", "quick", 0)
    contenders = (Contender("greedy", greedy, forward_only=True), *case.contenders)
    case = dataclasses.replace(case, contenders=contenders)
    rows, absent = measure.measure(case, ("quick", 0), CPU, 0.001, say=lambda text: None)
    assert {row["contender"] for row in rows} == {"gikernels", "torch", "copy"}
    reason = "out of memory"
    assert absent == [{"case": f"{case.label}, forward", "contender": "greedy", "reason": reason}]


def test_a_baseline_that_does_not_fit_costs_the_fractions_alone():
    def too_large(inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    case = cases.find("groups", "quick", 0)
    work = case.work[cases.FORWARD]._replace(baseline=too_large)
    case = dataclasses.replace(case, work={cases.FORWARD: work})
    rows, absent = measure.measure(case, ("quick", 0), CPU, 0.001, say=lambda text: None)
    assert [a["contender"] for a in absent] == ["copy"]
    assert {row["contender"] for row in rows} == {"gikernels", "torch"}
    assert all(row["fraction"] is None and row["median_ms"] > 0 for row in rows)


def test_without_a_listener_a_failure_is_no_secret():
    with pytest.raises(ZeroDivisionError):
        timing.interleaved({"a": lambda: 1 / 0}, CPU, seconds=0.001)


def test_no_git_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "no-git"


def test_the_path_of_the_caller_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert machine.with_path()["PYTHONPATH"] == f"{machine.ROOT}{os.pathsep}/somewhere/else"
    monkeypatch.delenv("PYTHONPATH")
    assert machine.with_path()["PYTHONPATH"] == str(machine.ROOT)


def test_a_python_loop_over_a_million_values_is_left_out():
    case = cases.find("group_advantages", "gpu", 1)
    assert case.shape["n"] == 1 << 20
    with pytest.raises(peers.Absent, match="half a minute"):
        calls.errors(case, case.contender("dictionary (verl)"), CPU)


def test_ligers_kernels_for_hopper_are_absent_with_a_reason():
    case = cases.find("linear_logprobs", "quick", 0)
    with pytest.raises(peers.Absent, match=r"compute capability 9\.0"):
        calls.errors(case, case.contender("Liger CuTe"), CPU)


def test_trls_head_has_gradients_where_datasets_is_not_installed():
    pytest.importorskip("trl")
    code = """
import sys
sys.modules["datasets"] = None
import torch
from bench.ops import calls, cases
case = cases.find("linear_logprobs", "quick", 0)
print(max(calls.errors(case, case.contender("TRL chunked"), torch.device("cpu")).values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=machine.with_path()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5


def test_a_gpus_clock_starts_behind_a_cold_cache_and_a_head_start(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, other):
            return 2.5  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    watch = timing.Stopwatch(CPU)
    watch.on_gpu = True
    watch.buffer, watch.sink = (
        torch.arange(9, dtype=torch.int32),
        torch.empty((), dtype=torch.int32),
    )
    assert watch(lambda: done.append("call"), 0.001) == pytest.approx(0.0025)
    cycles = int(timing.CLOCK * 0.001)
    assert done == [cycles, "record", "call", "record", "wait"]
    assert watch.sink == 8 and watch.buffer.tolist() == list(range(9))  # read, not written
    watch(lambda: None)
    assert done[5] == int(timing.CLOCK * timing.LEAST_HEAD_START)


# --- errors at the full size ----------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_policy_loss"])
def test_the_truth_in_parts_is_the_specification(op, monkeypatch):
    monkeypatch.setattr(truth, "CHUNK", 24)  # the last chunk is a part of one
    monkeypatch.setattr(truth, "KEPT", 20)
    case = cases.find(op, "quick", 0)
    inputs = case.inputs(case.shape, torch.float64, CPU)
    whole = calls.values_and_gradients(case, case.specification, inputs)
    names = tuple(name for name in whole if not name.startswith("d "))
    for some in {names, names[:1]}:
        whole = calls.values_and_gradients(case, case.specification, inputs, some)
        found = truth.of(case, inputs, some)
        assert set(found.found) == {*some, "d hidden", "d weight"}
        for name in some:
            torch.testing.assert_close(found.found[name], whole[name])
        torch.testing.assert_close(found.found["d hidden"], whole["d hidden"][found.rows])
        torch.testing.assert_close(found.found["d weight"], whole["d weight"][found.tokens])
    assert len(found.rows) == 20 and len(found.tokens) > 20


def test_an_error_in_dw_alone_is_seen():
    case = cases.find("linear_logprobs", "quick", 0)

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    off = Contender(
        "off", lambda i: peers.torch_linear_logprobs({**i, "weight": Off.apply(i["weight"])})
    )
    inputs, truths = case.inputs(case.shape, case.dtype, CPU), {}
    plain = truth.errors(case, case.contender("torch"), inputs, truths)
    assert max(plain.values()) < 1e-5 and len(truths) == 1
    found = truth.errors(case, off, inputs, truths)
    assert found["d weight"] == pytest.approx(0.01, rel=0.01) and found["d hidden"] < 1e-5
    rows, _ = measure.measure(case, ("quick", 0), CPU, 0.001, say=lambda text: None, truths={})
    ours = [row for row in rows if row["contender"] == "gikernels"]
    assert len(ours) == 2 and all("d weight" in row["errors"] for row in ours)
