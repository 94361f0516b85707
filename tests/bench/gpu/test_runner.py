"""Stages within their time: order, limits, what a kill, a crash and a hang leave behind.

The clock is false and the stages are functions here, but for the last part, which starts processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu import record, runner, stages
from bench.gpu.runner import CODE_FAILED, CODE_MISSING, Ending
from bench.host.machine import ROOT, with_path

GPU = {"torch": "2.14.0", "cuda": "13.0", "gpu": "NVIDIA H100 80GB HBM3"}
NO_GPU = {"torch": "2.14.0", "cuda": "13.0", "gpu": ""}
WHOLE = {stage.name: stage.seconds - 0.1 for stage in stages.STAGES}  # all that each may take
FIRST_FIVE = ["versions", "selftest", "triton", "gpu", "times"]


class Fake:
    """A clock, and stages that take what they are told and say what they are told."""

    def __init__(self, folder, **stages):
        self.folder, self.now, self.begun = folder, 0.0, []
        self.stages = stages  # seconds, or a function of the record and the limit

    def clock(self):
        return self.now

    def __call__(self, stage, limit):
        self.begun.append((stage.name, limit))
        does = self.stages.get(stage.name, 1.0)
        if callable(does):
            return does(self, record.Record(self.folder, stage.name), limit)
        self.now += min(does, limit)
        if does > limit:
            return Ending(None)
        record.Record(self.folder, stage.name).save(seen=stage.name)
        return Ending(0)

    @property
    def names(self):
        return [name for name, _ in self.begun]

    def run(self, *arguments, look=GPU):
        given = [*arguments, "--output", str(self.folder)]
        return command.main(given, look=lambda: look, start=self, clock=self.clock)

    def read(self, name):
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(autouse=True)
def nothing_is_built_or_hashed(monkeypatch):
    monkeypatch.setattr(record, "sources", lambda: "0123456789ab")


def test_everything_in_order_of_worth(tmp_path, capsys):
    fake = Fake(tmp_path)
    assert fake.run("--minutes", "15") == 0
    assert fake.names == [stage.name for stage in stages.STAGES]
    assert fake.names[:5] == FIRST_FIVE
    for name in fake.names:
        data = fake.read(name)
        assert data["status"] == "done" and data["found"] == {"seen": name}
        assert (data["sources"], data["device"]) == ("0123456789ab", GPU["gpu"])
    assert "| times | done |" in (tmp_path / "table.md").read_text()
    assert "| times | done |" in capsys.readouterr().out


def test_the_first_five_fit_into_four_minutes_even_if_each_takes_all_it_may(tmp_path):
    fake = Fake(tmp_path, **WHOLE)
    fake.now = 5.0  # what Python and PyTorch take to start is part of it

    def late():
        return fake.now

    given = ["--minutes", "4", "--output", str(tmp_path)]
    assert command.main(given, look=lambda: GPU, start=fake, clock=late) == 0
    assert fake.names == FIRST_FIVE
    assert fake.now <= 5 + 240
    for name in ("small", "peers", "training", "variants"):
        data = fake.read(name)
        assert data["status"] == "not run (time)" and "were left" in data["reason"]


def test_limits_grow_with_the_time_there_is_and_never_past_it(tmp_path):
    fake = Fake(tmp_path, peers=1e9)
    fake.run("--minutes", "12")
    wanted = sum(stage.seconds for stage in stages.STAGES)
    limits = dict(fake.begun)
    stretch = (720 - runner.RESERVE) / wanted
    assert stretch > 1
    for stage in stages.STAGES:
        assert limits[stage.name] == pytest.approx(stage.seconds * stretch)
    assert fake.read("peers")["status"] == "cut" and fake.read("training")["status"] == "done"

    alone = Fake(tmp_path / "alone")
    alone.run("--minutes", "60", "--only", "versions")
    assert dict(alone.begun)["versions"] == pytest.approx(runner.STRETCH * stages.STAGES[0].seconds)


def test_a_smaller_stage_may_still_fit_where_a_larger_does_not(tmp_path):
    fake = Fake(tmp_path)
    fake.run("--minutes", "1.5", "--only", "peers,variants")
    assert fake.names == ["variants"] and fake.read("peers")["status"] == "not run (time)"


def test_a_second_call_goes_on_with_what_is_left(tmp_path):
    first = Fake(tmp_path, **{**WHOLE, "times": 1e9})
    first.run("--minutes", "4")
    assert first.names == FIRST_FIVE and first.read("times")["status"] == "cut"
    again = Fake(tmp_path)
    assert again.run("--minutes", "15") == 0
    assert again.names == ["times", "small", "peers", "training", "variants"]
    nothing = Fake(tmp_path)
    assert nothing.run("--minutes", "15") == 0 and nothing.names == []
    forgotten = Fake(tmp_path)
    forgotten.run("--minutes", "15", "--only", "gpu", "--again")
    assert forgotten.names == ["gpu"]


FIRST = {"first": {"rows": [], "absent": []}}


def test_what_a_killed_call_had_found_is_there_and_the_stage_goes_on(tmp_path):
    def killed(fake, into, limit):
        into.save(cases=FIRST)
        raise KeyboardInterrupt

    fake = Fake(tmp_path, times=killed)
    assert fake.run("--minutes", "4") == 130
    data = fake.read("times")
    assert data["status"] == "running" and data["found"] == {"cases": FIRST}

    def goes_on(fake, into, limit):
        assert into.found == {"cases": FIRST}
        into.save(cases={**FIRST, "second": {"rows": [], "absent": []}})
        return Ending(0)

    fake = Fake(tmp_path, times=goes_on)
    assert fake.run("--minutes", "4") == 0
    assert fake.names[0] == "times" and fake.read("times")["status"] == "done"


def test_a_file_that_is_no_record_is_no_result(tmp_path):
    Fake(tmp_path).run("--minutes", "4")
    (tmp_path / "gpu.json").write_text('{"stage": "gpu", "sta')
    again = Fake(tmp_path)
    again.run("--minutes", "4", "--only", "versions,gpu")
    assert again.names == ["gpu"]


def test_results_of_other_sources_are_none_of_these(tmp_path, monkeypatch):
    Fake(tmp_path).run("--minutes", "15")
    monkeypatch.setattr(record, "sources", lambda: "fedcba987654")
    again = Fake(tmp_path)
    again.run("--minutes", "15")
    assert len(again.names) == len(stages.STAGES)
    assert again.read("times")["sources"] == "fedcba987654"


def test_another_gpus_results_are_not_overwritten(tmp_path, capsys):
    Fake(tmp_path).run("--minutes", "4")
    other = Fake(tmp_path)
    assert other.run("--minutes", "4", look={**GPU, "gpu": "NVIDIA H200"}) == 2
    assert other.names == [] and "has results of NVIDIA H100" in capsys.readouterr().err


def test_red_missing_and_crashed_are_told_apart(tmp_path, capsys):
    def red(fake, into, limit):
        into.because("linear_logprobs: dW off by 0.3")
        return Ending(CODE_FAILED, "traceback")

    fake = Fake(
        tmp_path,
        selftest=red,
        triton=lambda *_: Ending(CODE_MISSING, "no pytest"),
        gpu=lambda *_: Ending(-11, "Segmentation fault"),
    )
    assert fake.run("--minutes", "4") == 1
    assert fake.names[:5] == FIRST_FIVE  # and goes on after each
    assert [fake.read(name)["status"] for name in FIRST_FIVE] == [
        "done", "failed", "missing", "crashed", "done",
    ]  # fmt: skip
    assert fake.read("selftest")["reason"] == "linear_logprobs: dW off by 0.3"
    assert fake.read("gpu")["reason"] == "exit code -11: Segmentation fault"
    out = capsys.readouterr().out
    assert "Red, so no speed is shown" in out and "dW off by 0.3" in out
    # What is red stays red for the same sources; what crashed or was missing is tried again.
    again = Fake(tmp_path)
    assert again.run("--minutes", "4") == 1
    assert again.names == ["triton", "gpu"]


def test_a_crash_after_a_step_forward_goes_on_and_one_without_does_not(tmp_path):
    def crashes(fake, into, limit):
        fake.now += 5
        done = into.found.get("steps", 0)
        if done < 2:
            into.save(steps=done + 1)
            return Ending(-6, "illegal memory access")
        return Ending(0)

    fake = Fake(tmp_path, times=crashes, gpu=lambda *_: Ending(-6))
    fake.run("--minutes", "4", "--only", "gpu,times")
    assert fake.names == ["gpu", "times", "times", "times"]
    assert fake.read("times")["status"] == "done" and fake.read("gpu")["status"] == "crashed"
    assert fake.read("times")["seconds"] == 15


@pytest.mark.parametrize(
    ("arguments", "look", "says"),
    [
        ([], NO_GPU, "no GPU that this PyTorch can use (torch 2.14.0, built for CUDA 13.0)"),
        ([], {**NO_GPU, "cuda": None}, "built without CUDA"),
        (["--library", "/nowhere"], GPU, "no cuda-*.so or cpp-*.so there"),
        (["--only", "times,everything"], GPU, "no stage 'everything', there are versions"),
        (["--minutes", "0"], GPU, "want more than 0"),
    ],
)
def test_what_cannot_be_begun_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, look, says):
    fake = Fake(tmp_path / "out")
    try:
        code = fake.run(*arguments, look=look)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and says in error[-1] and not fake.begun
    assert not list(tmp_path.glob("out/*.json"))


def test_libraries_go_where_they_are_looked_for(tmp_path, monkeypatch):
    there = tmp_path / "gikernels" / "lib"
    there.parent.mkdir()
    monkeypatch.setattr(command, "LIBRARIES", there)
    brought = tmp_path / "lib90"
    brought.mkdir()
    (brought / "cuda-0011223344556677-sm90.so").write_text("elf")
    (brought / "else.txt").write_text("")
    fake = Fake(tmp_path / "out")
    assert fake.run("--minutes", "4", "--library", str(brought)) == 0
    assert [path.name for path in there.iterdir()] == ["cuda-0011223344556677-sm90.so"]


# --- real processes -------------------------------------------------------------------------------


def say(code):
    return [sys.executable, "-c", code]


def test_a_process_that_hangs_is_cut_with_all_its_children(tmp_path):
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    began = time.monotonic()
    ending = runner.launch(say(code), 3, tmp_path / "log", dict(os.environ))
    assert ending.code is None and 3 <= time.monotonic() - began < 20
    pid = int(ending.last_words)
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_last_words_of_a_process_that_ends(tmp_path):
    log = tmp_path / "log"
    assert runner.launch(say("print('fine')"), 20, log, dict(os.environ)) == (0, "fine")
    ending = runner.launch(say("raise OSError('broken pipe dream')"), 20, log, dict(os.environ))
    assert ending == (1, "OSError: broken pipe dream")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_process_behind(tmp_path):
    """Not even by a signal that it cannot see: what went on would be measured by the next call."""
    line = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--minutes", "4"]
    line += ["--only", "times", "--output", str(tmp_path)]
    parent = subprocess.Popen(line, cwd=ROOT, env=with_path(), stdout=subprocess.DEVNULL)
    try:
        workers = []
        for _ in range(300):
            workers = [
                int(path.parent.name)
                for path in Path("/proc").glob("[0-9]*/cmdline")
                if str(tmp_path).encode() in read(path) and b"bench.gpu.worker" in read(path)
            ]
            if workers:
                break
            time.sleep(0.1)
        assert workers
        time.sleep(1)  # its watch has begun
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(100):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(alive, workers))
    assert json.loads((tmp_path / "times.json").read_text())["status"] == "running"


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
