"""What is not what was written is told before anything is made of it; full disks; lost folders."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.trainer import tiny
from trainer.__main__ import main
from trainer.config import load
from trainer.runs.checkpoint import mark_finished, steps_done
from trainer.runs.faults import Diverged, RunError
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines
from trainer.stages import sft

SMALL = [*tiny.SMALL, "toy.layers=1", "sft.steps=2", "rm.steps=2", "ppo.steps=2",
         "ppo.prompts_per_step=8", "run.threads=1", "trainer.save_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "run"
    assert main(["train", "toy", *SMALL, "--output", str(path)]) == 0
    return path


@pytest.fixture
def run(trained, tmp_path):
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def gi(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return code, *capsys.readouterr()

    return call


def flip(path):
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def cut(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def empty(path):
    Path(path).write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, os.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_told_between_stages(run, gi, damage, name):
    damage(run.model("sft") / name)
    code, _, err = gi("rm", "toy", *SMALL, "--output", run.path)
    assert code == 1 and err.count("\n") == 1
    assert f"{run.model('sft')} is damaged ({name}" in err and "run stage sft again" in err


@pytest.mark.parametrize("name", ["sft", "rm", "policy"])
def test_a_damaged_model_is_told_at_resume(run, gi, name):
    flip(run.model(name) / "model.safetensors")
    code, _, err = gi("train", "toy", *SMALL, "--resume", "--output", run.path)
    assert code == 1 and f"{run.model(name)} is damaged" in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_damaged_pairs_are_told(run, gi, damage):
    (run.checkpoints("rm") / "finished").unlink()
    damage(run.pairs)
    code, _, err = gi("train", "toy", *SMALL, "--resume", "--output", run.path)
    assert code == 2 and f"{run.pairs}: is not what was written" in err and err.count("\n") == 1


def test_a_damaged_mark_is_none(run, gi):
    mark = run.checkpoints("ppo") / "finished"
    mark.write_bytes(mark.read_bytes().replace(b"2", b"9", 1))
    code, out, err = gi("train", "toy", *SMALL, "--resume", "--output", run.path)
    assert code == 0, err
    assert "ppo    is done" not in out and "goes on from" in out


def test_no_bit_of_a_mark_flips_unseen(tmp_path):
    """A line's end that became a vertical tab read as one before."""
    mark_finished(tmp_path, 2)
    mark = tmp_path / "finished"
    whole = mark.read_bytes()
    assert steps_done(tmp_path) == 2
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        mark.write_bytes(content)
        assert steps_done(tmp_path) is None, bit


@pytest.mark.parametrize("where", [0, 3, -1])
def test_a_broken_line_of_metrics_is_told_and_the_others_stay(run, where, capsys):
    lines = run.metrics.read_text().splitlines(keepends=True)
    lines[where] = lines[where].replace('"step": ', '"step": 1', 1)  # still JSON
    run.metrics.write_text("".join(lines))
    assert len(read_lines(run.metrics)) == len(lines) - 1
    MetricsLog(run, ("other",), 1, ()).close()
    number = range(1, len(lines) + 1)[where]
    assert f"metrics.jsonl: line {number} is not what was written" in capsys.readouterr().out


def test_samples_are_json(tmp_path):
    with MetricsLog(RunFolder(tmp_path), ("eval",), 0, ()) as log:
        log.write_samples("eval", 1, [{"score": float("nan"), "kl": float("inf"), "domain": None}])
    (text,) = RunFolder(tmp_path).samples.read_text().splitlines()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert line["score"] is None and line["kl"] is None


def test_doctor_finds_a_flip_in_every_file(run, gi):
    assert gi("doctor", run.path)[0] == 0
    # the report is made anew from the rest; the lock and the marks of a start say nothing of it
    told = [
        path
        for path in run.path.rglob("*")
        if path.is_file() and path.suffix not in (".png", ".html") and path.name[0] != "."
    ] + list(run.path.rglob(".metadata"))
    assert len(told) > 30
    for path in told:
        if path == run.config:
            continue  # its values are compared with what a resume asks for
        before = path.read_bytes()
        flip(path)
        code, out, _ = gi("doctor", run.path)
        assert code == 1, path
        assert any("whole" not in line and line.split()[0] in f"{path} {path.parent}"
                   for line in out.splitlines()), path  # fmt: skip
        path.write_bytes(before)
    assert gi("doctor", run.path)[0] == 0


# Settings.


@pytest.mark.parametrize(
    ("change", "stage"),
    [("sft.steps=5", "sft"), ("rm.lr=0.1", "rm"), ("model.dtype=bfloat16", "sft"),
     ("toy.noise=0.2", "sft"), ("kl.coef=0.9", "ppo"), ("rollout.temperature=0.9", "rm")],
)  # fmt: skip
def test_settings_of_a_stage_that_is_done_stay(run, gi, change, stage):
    before = run.config.read_bytes()
    code, _, err = gi("train", "toy", *SMALL, change, "--resume", "--output", run.path)
    assert code == 2 and f"stage {stage} is done with other settings ({change.split('=')[0]}" in err
    assert run.config.read_bytes() == before


def test_settings_of_what_is_to_come_may_change_and_are_noted(run, gi):
    change = ["ppo.steps=3", "trainer.tokens_per_microbatch=2000"]
    code, out, err = gi("train", "toy", *SMALL, *change, "--resume", "--output", run.path)
    assert code == 0, err
    assert "goes on with other settings: ppo.steps: 2 -> 3" in out
    assert run.config.read_text().startswith("# went on with ppo.steps: 2 -> 3\n")
    assert load(str(run.config)).ppo.steps == 3


# Places.


def test_the_folder_is_checked_before_anything_is_written(tmp_path, gi):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    linked = tmp_path / "linked"
    (linked / "models").mkdir(parents=True)
    (linked / "models" / "sft").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for output in ("file", "file/inner", "dangling", "linked", "x" * 300, "/proc/run", "/proc/1/x"):
        code, out, err = gi("train", "toy", *SMALL, "--output", tmp_path / output)
        assert code == 2 and out == "" and err.count("\n") == 1, output
        assert "run.output" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_nothing_can_run_with_write_nothing(tmp_path, gi):
    for bad in ("model.attention=nope", "run.stages=[ppo, sft]", f"run.seed={2**64}"):
        code, _, err = gi("train", "toy", *SMALL, bad, "--output", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1 and bad.split("=")[0] in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [shutil.rmtree, lambda path: Path(path).rename(f"{path}-away")])
def test_a_folder_that_goes_away_ends_the_run(tmp_path, monkeypatch, how):
    run, real = RunFolder(tmp_path / "run"), sft.Sft.step

    def step(self, number):
        if number == 1:
            how(run.path)
        return real(self, number)

    monkeypatch.setattr(sft.Sft, "step", step)
    with pytest.raises(RunError, match="was removed or renamed while the run wrote to it"):
        sft.run(tiny.config(run.path, *SMALL, "sft.steps=3"), run)


def wanders(prompts, answers, meta):
    os.chdir("/")
    return [0.0] * len(answers)


def test_a_reward_that_changes_the_folder_does_not_split_the_output(run, tmp_path, gi, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = f"reward.functions=[{{function: '{__name__}:wanders'}}]"
    shutil.copytree(run.path / "models", tmp_path / "here" / "models")
    code, _, err = gi("ppo", "toy", *SMALL, function, "--output", "here")
    assert code == 0, err
    assert Path.cwd() == tmp_path and (tmp_path / "here" / "models" / "policy").is_dir()
    assert len(read_lines(tmp_path / "here" / "metrics.jsonl")) > 3


# Disks.


@pytest.mark.parametrize("kilobytes", [4, 40, 150, 300, 500, 800])
def test_a_full_disk_is_one_line_wherever_it_fills_up(tmp_path, gi, kilobytes):
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)])
    if done.returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        code, _, err = gi("train", "toy", *SMALL, "--output", place / "run")
        assert code == 1 and err.count("\n") == 1 and "No space left on device" in err, err
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# Divergence.


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("stage", ["policy", "critic"])
def test_weights_that_ran_away_are_what_is_said(run, gi, monkeypatch, value, stage):
    from trainer.ppo import loop

    real = loop.Ppo.step

    def step(self, number):
        metrics = real(self, number)
        if number == 1:
            with torch.no_grad():
                model = getattr(self.t.actors, stage)
                next(model.parameters()).fill_(value)
        return metrics

    monkeypatch.setattr(loop.Ppo, "step", step)
    options = [*SMALL, "ppo.steps=8", "trainer.max_skipped=2", "eval.every=0"]
    (run.checkpoints("ppo") / "finished").unlink()
    shutil.rmtree(run.checkpoints("ppo"))
    config = load("toy", [*options, f"run.output={run.path}"])
    with pytest.raises(Diverged) as it:
        loop.run(config, run)
    assert "step" in str(it.value) and "--resume" in str(it.value)
