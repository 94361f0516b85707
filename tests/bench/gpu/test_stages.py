"""Real stages at tiny sizes on a CPU, and from a bare checkout."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from bench.gpu import checks, record, times, variants
from bench.gpu.record import Missing, Record, Red
from bench.host.machine import ROOT, with_path

CPU = torch.device("cpu")


def gpu(*arguments, cwd=ROOT, environment=None):
    line = [sys.executable, "-m", "bench.gpu", "--device", "cpu", *map(str, arguments)]
    given = with_path() if environment is None else environment
    return subprocess.run(line, cwd=cwd, env=given, capture_output=True, text=True)


@pytest.mark.slow
def test_the_cheap_stages_on_a_cpu(tmp_path):
    done = gpu("--minutes", 4, "--only", "versions,triton,small", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"versions", "triton", "small"}

    versions = found["versions"]["found"]
    assert versions["machine"]["versions"]["torch"] == torch.__version__
    assert versions["product_tflops"] > 0 and versions["copy_tb_per_s"] > 0
    assert versions["backends"]["reference"][0] is True

    counts = found["triton"]["found"]["counts"]
    assert counts["passed"] > 0 and counts["failed"] == 0

    cases = found["small"]["found"]["cases"]
    assert len(cases) == 2
    for case in cases.values():
        assert case["absent"] == []
        rows = [row for row in case["rows"] if row["contender"] == "gikernels"]
        assert rows and all(row["errors"]["d weight"] < 1e-5 for row in rows)
        assert all(row["within_bound"] and row["median_ms"] > 0 for row in rows)
    assert "### linear_logprobs" in (tmp_path / "table.md").read_text()


def test_from_a_bare_checkout_without_git_and_nvcc(tmp_path):
    """Three folders, no .git, no installation, no pyproject.toml, a PATH with nothing on it."""
    bare, empty, out = tmp_path / "bare", tmp_path / "bin", tmp_path / "out"
    empty.mkdir()
    for name in ("gikernels", "bench", "tests"):
        shutil.copytree(
            ROOT / name, bare / name,
            ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"),
        )  # fmt: skip
    environment = {
        "PATH": str(empty),
        "PYTHONPATH": str(bare),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "GIKERNELS_CACHE": str(tmp_path / "cache"),
    }
    command = ("--minutes", 2, "--only", "versions", "--output", out)
    done = gpu(*command, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((out / "versions.json").read_text())
    assert data["status"] == "done" and data["found"]["commit"] == "no-git"
    ready, why = data["found"]["backends"]["cpp"]
    assert not ready and "compiler" in why
    assert data["sources"] != "" and not (bare / "gikernels" / "lib").exists()


def test_no_gpu_is_said_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = [sys.executable, "-m", "bench.gpu", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=with_path(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("bench.gpu: no GPU") and len(done.stderr.splitlines()) == 1


def test_the_hash_is_of_what_is_measured(tmp_path):
    package = tmp_path / "gikernels"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    before = record.sources(tmp_path)
    (tmp_path / "bench.py").write_text("")
    assert record.sources(tmp_path) == before
    (package / "csrc").mkdir()
    (package / "csrc" / "p.cu").write_text("")
    assert record.sources(tmp_path) != before


# --- checks ---------------------------------------------------------------------------------------


def test_a_selftest_that_is_not_there_has_not_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    into = Record(tmp_path / "out", "selftest")
    with pytest.raises(Missing, match="not in this checkout"):
        checks.selftest(into, "cpu")
    package = tmp_path / "gikernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "selftest.py").write_text("import sys\nprint(*sys.argv[1:], 'all right')\n")
    checks.selftest(into, "cpu")
    assert into.found == {"code": 0, "says": "--device cpu all right"}
    (package / "selftest.py").write_text("raise SystemExit('dW off by 0.3')\n")
    with pytest.raises(Red, match=r"dW off by 0\.3"):
        checks.selftest(into, "cpu")
    assert record.read(tmp_path / "out" / "selftest.json")["found"]["code"] == 1


@pytest.mark.parametrize(
    ("suite", "error", "says"),
    [
        ("def test_triton(): assert False", Red, "1 of 1 tests: test_a.py::test_triton"),
        ("import nothing_of_this_name", Red, "1 of 2 tests: test_a.py"),
        ("def test_else(): pass", Missing, "no such test"),
        ("import pytest\ndef test_triton(): pytest.skip('no GPU')", Missing, "skipped"),
    ],
)
def test_tests_that_did_not_pass(tmp_path, monkeypatch, suite, error, says):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_a.py").write_text(suite + "\n")
    if "nothing" in suite:
        (tmp_path / "test_b.py").write_text("def test_triton(): pass\n")
    into = Record(tmp_path / "out", "triton")
    files = [path.name for path in sorted(tmp_path.glob("test_*.py"))]
    with pytest.raises(error, match=says):
        checks.tests(into, "cpu", files, "not gpu", "triton")


# --- the cases of a stage -------------------------------------------------------------------------


def row(name="gikernels"):
    return {"contender": name, "median_ms": 1.0}


def test_a_case_that_kills_its_process_twice_is_left_out(tmp_path):
    """As if the process had died in `second`, two times."""
    into = Record(tmp_path, "times")
    into.save(cases={"first": {"rows": [row()], "absent": []}}, begun={"first": 1, "second": 2})
    called = []

    def case(name):
        def carry_out():
            called.append(name)
            return [row()], []

        return carry_out

    todo = {name: case(name) for name in ("first", "second", "third")}
    with pytest.raises(Red, match="cut or crashed 2 times"):
        times.go_through(into, todo, CPU)
    assert called == ["third"]
    cases = record.read(tmp_path / "times.json")["found"]["cases"]
    assert cases["second"]["rows"] == [] and len(cases["third"]["rows"]) == 1


def test_what_is_done_is_written_before_the_next_is_begun(tmp_path):
    into, seen = Record(tmp_path, "times"), []

    def look():
        seen.append(record.read(tmp_path / "times.json")["found"])
        return [row()], []

    def breaks():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Red, match="out of memory"):
        times.go_through(into, {"a": look, "b": breaks, "c": look}, CPU)
    assert seen[0]["begun"] == {"a": 1} and seen[0]["cases"] == {}
    assert list(seen[1]["cases"]) == ["a", "b"]


def test_the_stages_measure_what_they_say(monkeypatch):
    """The cases of a GPU, without running them."""
    todo = {}
    monkeypatch.setattr(times, "go_through", lambda record, cases, *_, **__: todo.update(cases))
    times.times(None, "cuda")
    labels = list(todo)
    head = "N=8192 D=4096 V=128256 bfloat16"
    assert labels[:3] == [
        f"linear_logprobs {head}", f"linear_policy_loss {head}",
        f"linear_logprobs in pieces linear_logprobs {head}",
    ]  # fmt: skip
    for op in ("experience S=512", "groups n=1048576", "partition n=8192", "logprobs N=8192 V=128"):
        assert any(label.startswith(op) for label in labels), op
    todo.clear()
    times.small(None, "cuda")
    assert all("D=896" in label for label in todo) and len(todo) == 2
    todo.clear()
    times.others(None, "cuda")
    labels = list(todo)
    assert labels[0].endswith("beside Liger CuTe")
    for peer in ("cut-cross-entropy", "TRL chunked", "torch linear_cross_entropy", "torch.compile"):
        assert any(label.endswith(f"beside {peer}") for label in labels), peer


def test_pieces_of_the_head():
    case = times.pick("linear_logprobs", "quick", 0)
    rows, absent = times.pieces(case, CPU)
    assert absent == [] and [r["formula"] for r in rows] == [
        "2 N D V", "2 N D V", "2 N D V", "2 N D V", "4 N D V", "4 N D V", "6 N D V",
    ]  # fmt: skip


# --- variants -------------------------------------------------------------------------------------


def test_a_variant_changes_the_tile_for_the_call_alone():
    tiles = variants._tiles()
    x, w = torch.zeros(64, 32), torch.zeros(128, 32)
    usual = tiles.blocks_for(x, w)
    with variants.using({"num_stages": 7, "programs": 2}) as asked:
        changed = tiles.blocks_for(x, w)
        assert tiles.programs(CPU, 1000) == 2 * 3  # a CPU's three
    assert changed == usual._replace(num_stages=7) and asked == [changed]
    assert tiles.blocks_for(x, w) == usual
    with variants.using({"no_such_switch": 1}), pytest.raises(variants.Absent, match="no switch"):
        tiles.blocks_for(x, w)


# --- pytest's plugin ------------------------------------------------------------------------------

SUITE = """
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

@st.composite
def pairs(draw):
    return draw(st.integers(0, 3)), draw(st.integers() | st.none())

@pytest.mark.parametrize("kind", ["a", "b"])
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow])
@given(pair=pairs())
def test_by_name(kind, pair): pass

@given(st.lists(st.integers()).map(len), pairs())
def test_by_place(tmp_path_factory, size, pair): pass

def test_plain(): pass
def test_red(): assert 1 == 2
"""


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize("installed", [True, False])
def test_results_are_written_as_they_come(tmp_path, installed, processes):
    if processes != "0":
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(SUITE)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    if not installed:
        (hidden / "hypothesis.py").write_text("raise ImportError('not installed')\n")
    environment = with_path() | {record.FOLDER: str(tmp_path / "out"), record.STAGE: "triton"}
    environment["PYTHONPATH"] = os.pathsep.join([str(hidden), environment["PYTHONPATH"]])
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p"]
    line += ["bench.gpu.plugin", "-n", processes, "-c", os.devnull, "--rootdir", str(tmp_path)]
    if not installed:  # hypothesis' own plugin would import it before
        line += ["-p", "no:hypothesispytest"]
    done = subprocess.run(
        [*line, str(tmp_path / "test_it.py")], env=environment, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = record.read(tmp_path / "out" / "triton.json")["found"]
    skipped = 0 if installed else 3
    assert found["counts"] == {"passed": 4 - skipped, "failed": 1, "skipped": skipped}
    (failure,) = found["failures"]
    assert failure["test"].endswith("::test_red") and "assert 1 == 2" in failure["says"]
