"""Two starts, restarts, orphans, a kill while a start tidies up, one rank's error: who owns a run
folder, and who says what happened."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.trainer import children, tiny
from trainer.__main__ import main
from trainer.cli import begin
from trainer.config import load
from trainer.runs import files, lock
from trainer.runs.checkpoint import mark_finished, steps_done, steps_in
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines

SFT = [*tiny.SMALL, "toy.layers=1", "sft.steps=3", "run.stages=[sft]", "trainer.save_every=1"]
RESTART = "TORCHELASTIC_RESTART_COUNT"


def eventually(holds, seconds=60):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts") / "run"
    assert main(["train", "toy", *SFT, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def done(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def everything(folder):
    """Path -> content, but for who was here last."""
    names = [path for path in Path(folder).rglob("*") if path.is_file()]
    hidden = (".lock", ".accepted", "errors.txt")
    return {str(p.relative_to(folder)): p.read_bytes() for p in names if p.name not in hidden}


# torchrun --max-restarts.


def test_a_restart_does_not_take_over_another_runs_folder(done, monkeypatch, capsys):
    before = everything(done)
    other = ["train", "toy", *SFT, "sft.lr=0.5", "--output", str(done)]
    for attempt in ("0", "1", "2"):
        monkeypatch.setenv(RESTART, attempt)
        assert main(other) == 2
        assert "holds a run with other settings (sft.lr: 0.002 -> 0.5)" in capsys.readouterr().err
        assert everything(done) == before


def test_a_restart_of_an_accepted_attempt_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["train", "toy", *SFT, "--output", str(tmp_path / "run")]
    assert children.run(children.command, arguments, None, ("sft", 2)) == -signal.SIGKILL
    monkeypatch.setenv(RESTART, "1")
    # its parent is another process than ours, as another torchrun's would be: held to the check
    config = _config(arguments)
    assert not begin.accepted(RunFolder(tmp_path / "run"), config, ("sft",))
    monkeypatch.setattr(begin, "_started", lambda pid: "")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    accepted = begin.attempt(config, ("sft",))
    (tmp_path / "run" / ".accepted").write_text(accepted)
    assert main(arguments) == 0
    assert "goes on from" in capsys.readouterr().out


def _config(arguments):
    return load("toy", [*arguments[2:-2], f"run.output={arguments[-1]}"])


# Two starts in one folder.


def test_a_second_start_is_refused_and_says_who_is_there(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["train", "toy", *SFT, "--output", str(folder)]
    first = children.start(children.command, arguments, None, ("sft", 2, signal.SIGSTOP))
    eventually(lambda: len(read_lines(RunFolder(folder).metrics)) == 2)
    before = everything(folder)
    for flags in ([], ["--resume"]):
        assert main([*arguments, *flags]) == 1
        err = capsys.readouterr().err
        assert f"in use by pid {first.pid}" in err and err.count("\n") == 1
    assert everything(folder) == before
    os.kill(first.pid, signal.SIGCONT)
    assert children.wait([first]) == [0]
    assert [line["step"] for line in read_lines(RunFolder(folder).metrics)] == [1, 2, 3]


def test_a_lock_ends_with_its_process(tmp_path):
    run = RunFolder(tmp_path)
    run.lock.write_text("99999999\n")  # of a process that was killed
    with lock.held(run):
        assert run.lock.read_text() == f"{os.getpid()}\n"
    with lock.held(run):
        pass


# Baselines.


@pytest.fixture
def with_baseline(base, tmp_path):
    """Arguments of a run whose own PPO is short and whose baseline would take hours."""
    shutil.copytree(base.path / "models", tmp_path / "run" / "models")
    overrides = [*tiny.SMALL, "ppo.steps=1", "ppo.prompts_per_step=8", "trainer.save_every=1"]
    beside = "baselines={long: [ppo.steps=100000]}"
    return ["ppo", "toy", *overrides, beside, "--output", str(tmp_path / "run")]


def processes_of(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(folder).encode() in word for word in words) and b"trainer" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_killed_run_leaves_no_baseline_behind(with_baseline):
    folder = Path(with_baseline[-1])
    beside = RunFolder(folder).baseline("long")
    process = children.start(children.command, with_baseline)
    eventually(lambda: len(read_lines(beside.metrics)) > 3, 120)
    assert processes_of(beside.path)
    process.kill()
    process.join()
    try:
        eventually(lambda: not processes_of(beside.path), 20)
    finally:
        for pid in processes_of(beside.path):
            os.kill(pid, signal.SIGKILL)


def test_sigterm_while_waiting_for_a_baseline_reaches_it(with_baseline, tmp_path):
    folder, said = Path(with_baseline[-1]), tmp_path / "said.txt"
    run, beside = RunFolder(folder), RunFolder(folder).baseline("long")
    process = children.start(children.command, with_baseline, said)
    eventually(lambda: steps_done(run.checkpoints("ppo")) == 1, 120)
    eventually(lambda: len(read_lines(beside.metrics)) > 3, 120)
    process.terminate()
    process.join(60)
    left = processes_of(beside.path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and process.exitcode == 143
    assert "stopped by SIGTERM while baseline long ran" in said.read_text()
    newest = max(steps_in(beside.checkpoints("ppo")))
    lines = [line["step"] for line in read_lines(beside.metrics) if line["stage"] == "ppo"]
    assert newest == lines[-1]  # it ended its step and kept it


@pytest.mark.parametrize("name", ["..", ".", "-x", "a" * 200])
def test_a_baseline_has_a_folder_of_its_own(tmp_path, capsys, name):
    asked = f"baselines={{'{name}': [kl.coef=0.1]}}"
    assert main(["train", "toy", asked, "--output", str(tmp_path / "run")]) == 2
    assert "want a name of letters" in capsys.readouterr().err


# A kill while a start removes what it is about to do again.


def whole_run(folder):
    """What a run with two rounds leaves, with contents that say what they are of."""
    run = RunFolder(folder)
    for name in ("sft", "rm", "policy"):
        model(run.model(name), "sft" if name == "sft" else "round 2")
    for n in range(3):
        for name in ("rm", "policy"):
            model(run.round(n).model(name), f"round {n}")
        for stage in ("metarm", "ppo", "round") if n else ():
            mark_finished(run.round(n).checkpoints(stage), 5)
    for stage in ("sft", "rm", "ppo"):
        mark_finished(run.checkpoints(stage), 5)
        (run.checkpoints(stage) / "step_5").mkdir()
        (run.checkpoints(stage) / "step_5" / "data").write_text("of an earlier run")
    with MetricsLog(run, ("ppo",), 0, ()) as log:
        for stage in ("ppo", "metarm"):
            for step in range(3):
                log.write(stage, step, {"x": 1})
    return run


def model(path, content):
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(content)
    files.seal(path)


def again(folder, stages):
    run = RunFolder(folder)
    begin.settle(run)
    begin.do_again(run, stages)


def again_and_die(folder, stages, event):
    """kill -9 before the `event`-th change of the file system."""
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "open")
    count = 0

    def watch(name, arguments):
        nonlocal count
        if name in changes and (name != "open" or set(str(arguments[1])) & set("wa+x")):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    again(folder, stages)


def test_killed_while_tidying_up_both_ways_on_are_right(tmp_path):
    whole_run(tmp_path / "whole")
    want = Path(shutil.copytree(tmp_path / "whole", tmp_path / "want"))
    again(want, ["ppo"])
    assert not (want / "rounds").exists() and not (want / ".begin").exists()
    for name in ("rm", "policy"):
        assert (want / "models" / name / "model.safetensors").read_text() == "round 0"
    assert steps_done(want / "checkpoints" / "rm") == 5
    killed = 0
    for event in [*range(1, 40), *range(40, 200, 9)]:
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"at{event}"))
        code = children.run(again_and_die, folder, ["ppo"], event)
        killed += code == -signal.SIGKILL
        began = (folder / ".begin").exists() or not (folder / "rounds").exists()
        restarted = Path(shutil.copytree(folder, tmp_path / f"restarted{event}"))
        again(folder, [])  # --resume
        assert everything(folder) == everything(want if began else tmp_path / "whole"), event
        assert began or event <= 2
        again(restarted, ["ppo"])
        assert everything(restarted) == everything(want), event
        if code == 0:
            break
    assert killed > 30


def test_marks_go_before_anything_else(tmp_path):
    run = whole_run(tmp_path)
    mine = []

    def watch(name, arguments):
        if name in ("os.remove", "os.rename") and str(tmp_path) in str(arguments[0]):
            mine.append(str(arguments[0]))

    sys.addaudithook(watch)
    begin.do_again(run, ["ppo"])
    marks = [i for i, path in enumerate(mine) if path.endswith("finished")]
    others = [i for i, path in enumerate(mine) if "/models/" in path or path.endswith("rounds")]
    assert len(marks) >= 7 and max(marks) < min(others)


# One rank's error.


def fails_on_rank_1(prompts, answers, meta):
    if any(answers) and os.environ.get("RANK") == "1":
        raise KeyError("only here")
    return [0.5] * len(answers)


def test_one_ranks_error_is_told_by_it_and_named_by_rank_0(base, tmp_path):
    shutil.copytree(base.path / "models", tmp_path / "run" / "models")
    function = "tests.trainer.cli.test_starts:fails_on_rank_1"
    arguments = ["ppo", "toy", *tiny.SMALL, "ppo.prompts_per_step=8", "reward.model_weight=0",
                 "model.critic=policy", f"reward.functions=[{{function: '{function}'}}]",
                 "--output", str(tmp_path / "run")]  # fmt: skip
    codes = children.run_ranks(2, children.command_on_rank, arguments, tmp_path)
    assert 0 not in codes
    first, second = ((tmp_path / f"rank{r}.txt").read_text() for r in (0, 1))
    problem = "reward.functions[0]: tests.trainer.cli.test_starts:fails_on_rank_1 raised KeyError"
    assert f"gi: rank 1: {problem}" in second and second.count("\n") == 1
    assert f"{problem}: 'only here'; prompt '" in first and first.endswith("(of rank 1)\n")
    assert first.count("\n") == 1


def test_a_rank_that_is_killed_is_told_of_by_the_other(tmp_path):
    """Without a launcher that ends it, too: torchrun may be quicker than what it would say."""
    arguments = ["train", "toy", *SFT, "--output", str(tmp_path / "run")]
    codes = children.run_ranks(2, children.command_on_rank, arguments, tmp_path, ("sft", 2))
    assert codes == [-signal.SIGKILL, 1]
    said = (tmp_path / "rank1.txt").read_text().splitlines()[-1]
    assert said.startswith("gi: rank 1: another rank is gone: ")


def test_what_every_rank_meets_is_told_once(tmp_path):
    run = RunFolder(tmp_path / "run")
    arguments = ["train", "toy", *SFT, "--output", str(run.path)]
    with lock.held(run):
        assert 0 not in children.run_ranks(2, children.command_on_rank, arguments, tmp_path)
    said = [(tmp_path / f"rank{r}.txt").read_text() for r in (0, 1)]
    assert said[0].count(f"in use by pid {os.getpid()}") == 1 and said[1] == ""
    assert everything(run.path) == {}


def test_the_mark_of_acceptance_is_of_settings_and_launch(tmp_path, monkeypatch):
    config = load("toy", [*SFT, f"run.output={tmp_path}"])
    first = json.loads(begin.attempt(config, ("sft",)))
    other = json.loads(begin.attempt(config.override(["sft.lr=0.5"]), ("sft",)))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    third = json.loads(begin.attempt(config, ("sft",)))
    assert first["launch"] == other["launch"] != third["launch"]
    assert first["asked"] == third["asked"] != other["asked"]
