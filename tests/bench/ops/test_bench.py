"""`python -m bench`: a smoke run writes whole results; a red test stops it; a new op is small."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as command
from bench.host.machine import ROOT
from bench.ops import calls, cases, measure, report, timing
from bench.ops.peers import Absent, Contender

FIELDS = {
    "op", "shape", "dtype", "mode", "contender", "median_ms", "p20_ms", "p80_ms", "graph_ms",
    "calls", "rate", "unit", "formula", "fraction", "fraction_of", "peak_extra_bytes",
    "memory_method", "errors", "within_bound", "lacks",
}  # fmt: skip


@pytest.fixture
def green(tmp_path):
    path = tmp_path / "test_green.py"
    path.write_text("def test_green():\n    pass\n")
    return path


def bench(*arguments):
    line = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_smoke_run_writes_everything(tmp_path, green):
    out = tmp_path / "results"
    quick = ("--quick", "--seconds", "0.01", "--device", "cpu", "--threads", "1")
    done = bench(*quick, "--only", "logprobs", "--output", out, "--tests", green)
    assert done.returncode == 0, done.stderr
    files = {path.suffix: path for path in out.iterdir()}
    assert set(files) == {".json", ".csv", ".md", ".png"}
    results = json.loads(files[".json"].read_text())
    assert {"date", "commit", "machine", "tests", "rows", "absent"} <= set(results)
    assert results["machine"]["versions"]["torch"] == torch.__version__.split("+")[0] or (
        results["machine"]["versions"]["torch"] == torch.__version__
    )
    assert results["commit"] in files[".json"].name and results["date"] in files[".json"].name

    rows = results["rows"]
    assert all(set(row) == FIELDS for row in rows)
    for mode in (cases.FORWARD, cases.BOTH):
        by_name = {row["contender"]: row for row in rows if row["mode"] == mode}
        assert {"gikernels", "torch", "copy"} <= set(by_name)
        assert by_name["copy"]["fraction"] == 1
        for row in by_name.values():
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rate"] > 0
        own = by_name["gikernels"]
        assert own["within_bound"] and own["lacks"] == ""
        assert set(own["errors"]) == {"logprobs", "entropy", "d logits"}
        assert max(own["errors"].values()) < 1e-5
    present = {row["contender"] for row in rows}
    for contender in cases.find("logprobs", "quick", 0).contenders:
        reasons = [a["reason"] for a in results["absent"] if a["contender"] == contender.name]
        assert (contender.name in present) != bool(reasons), contender.name

    table = list(csv.DictReader(files[".csv"].open()))
    assert len(table) == len(rows) and float(table[0]["median_ms"]) == rows[0]["median_ms"]
    again = subprocess.run(
        [sys.executable, "-m", "bench.ops.report", str(files[".json"])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert again.stdout.strip() == files[".md"].read_text().strip()


def test_no_speed_is_reported_while_a_test_is_red(tmp_path):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    out = tmp_path / "results"
    done = bench("--quick", "--only", "groups", "--output", out, "--tests", red)
    assert done.returncode == 1 and "no speed is reported" in done.stderr
    assert not out.exists()


def test_unknown_op_is_named():
    with pytest.raises(SystemExit) as stopped:
        command.parse(["--only", "logprobs,nothing"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("op", cases.OPS)
def test_every_contender_computes_what_it_says(op):
    """Errors of the peers: a wrong adapter would make a comparison worthless."""
    for case in cases.OPS[op]("quick"):
        plain = {}
        if any(c.name == "torch" for c in case.contenders):
            plain = calls.errors(case, case.contender("torch"), torch.device("cpu"))
            assert plain and max(plain.values()) < 1e-4
        for contender in case.contenders:
            try:
                found = calls.errors(case, contender, torch.device("cpu"))
            except (Absent, ImportError):
                continue
            assert found and max(found.values()) < 1e-4, contender.name
            ours = contender.name.startswith("gikernels")
            assert not ours or calls.within_bound(found, plain), (found, plain)


def test_bounds():
    plain = {"logprobs": 1e-4, "d hidden": 1e-3}
    assert calls.within_bound({"logprobs": 2e-4, "d hidden": 1e-3}, plain)
    assert not calls.within_bound({"logprobs": 1e-4, "d hidden": 2.1e-3}, plain)
    assert not calls.within_bound({"logprobs": float("nan")}, plain)


def test_a_contender_that_fails_is_listed_with_its_reason():
    def breaks(inputs):
        raise Absent("needs a bigger boat")

    case = cases.find("groups", "quick", 0)
    case = cases.Case(**{**vars(case), "contenders": (Contender("boat", breaks),)})
    rows, absent = measure.measure(
        case, ("quick", 0), torch.device("cpu"), 0.001, say=lambda text: None
    )
    assert [row["contender"] for row in rows] == ["copy"]
    assert absent == [{"case": case.label, "contender": "boat", "reason": "needs a bigger boat"}]


def test_quantiles_and_turns():
    times = timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert times.median == 3.5 and times.low == 2.0 and times.high == 5.0 and times.calls == 6
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleaved(functions, torch.device("cpu"), seconds=1e-9, at_least=4)
    assert "".join(calls) == "ab" + "baab" * 2 and found["a"].calls == 4


def test_table_marks_what_is_out_of_bounds():
    row = {
        "op": "x", "shape": {"N": 1}, "dtype": "float32", "mode": "forward", "contender": "peer",
        "median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "calls": 3, "rate": 2.0, "unit": "GB/s",
        "formula": "N", "fraction": 0.5, "fraction_of": "copy", "peak_extra_bytes": 1 << 20,
        "memory_method": "", "errors": {"y": 1.0}, "within_bound": False, "lacks": "z",
    }  # fmt: skip
    machine = {"device": "d", "versions": {"torch": "2"}}
    text = report.markdown(
        {"machine": machine, "date": "t", "commit": "c", "tests": "green", "rows": [row],
         "absent": [{"case": "x", "contender": "w", "reason": "gone"}]}
    )  # fmt: skip
    assert "| peer | 1.000 | 0.900 | 1.100 | 2 | 50 % | 1.0 | **1.0e+00** | z |" in text
    assert "- w (x): gone" in text and "replayed" not in text
    row |= {"graph_ms": 0.0125, "fraction": None}
    text = report.markdown(
        {"machine": machine, "date": "t", "commit": "c", "tests": "green", "rows": [row],
         "absent": []}
    )  # fmt: skip
    assert "As a replayed CUDA graph, caches warm: peer 0.0125 ms." in text


def test_benchmarks_are_not_collected_by_make_test():
    files = list((ROOT / "bench" / "ops").glob("bench_*.py"))
    assert files and all(not f.name.startswith("test_") for f in files)
