"""Nothing that befalls a run loses it: kill -9 anywhere, full disks, damaged files, SIGTERM."""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import children, tiny
from trainer import parallel
from trainer.runs import files
from trainer.runs.checkpoint import CheckpointError, Checkpoints, steps_in
from trainer.runs.faults import Diverged, Guard, Stopped
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines
from trainer.runs.optim import Optimizer
from trainer.runs.state import TrainState

SMALL = [
    "toy.layers=1",
    "sft.steps=5",
    "sft.batch=16",
    "rm.steps=5",
    "rm.batch=16",
    "rm.pairs=32",
    "ppo.steps=5",
    "ppo.prompts_per_step=8",
    "groups.draw=variance",  # looks at what groups have returned so far
    "rollout.max_new_tokens=6",
    "eval.samples_per_domain=4",
    "trainer.save_every=2",
]
STAGES = ("sft", "rm", "ppo")


class Small:
    """A state whose every number says which step it is of."""

    def __init__(self, folder, keep_last=2, async_save=False, size=200):
        self.model = torch.nn.Linear(size, 8)
        self.optimizer = Optimizer([(1e-3, self.model.parameters())])
        self.state = TrainState({"m": self.model}, {"m": self.optimizer})
        self.run = RunFolder(folder)
        trainer = SimpleNamespace(
            save_every=1, keep_last=keep_last, best=("score",), async_save=async_save
        )
        self.config = SimpleNamespace(trainer=trainer, run=SimpleNamespace(seed=0))

    def open(self, resume):
        return Checkpoints(self.config, self.run, "sft", self.state, resume)

    def fill(self):
        with torch.no_grad():
            for tensor in self.numbers():
                tensor.fill_(self.state.step)

    def numbers(self):
        moments = [x for each in self.optimizer.state_dict().values() for x in each.values()]
        return [*self.model.parameters(), *moments]

    def holds(self):
        return {float(x) for each in self.numbers() for x in each.detach().unique()}


def steps(small):
    return sorted(steps_in(small.run.checkpoints("sft")))


def save_forever(folder):
    small = Small(folder)
    checkpoints = small.open(resume=True)
    while True:
        small.state.step += 1
        small.fill()
        checkpoints.save()


def test_killed_while_saving_at_20_random_moments(tmp_path):
    """A whole checkpoint can always be loaded, and it is not older than the newest before."""
    newest, moments = 0, random.Random(0)
    for _ in range(20):
        process = children.start(save_forever, tmp_path)
        deadline = time.monotonic() + 60
        small = Small(tmp_path)
        while max(steps(small), default=0) <= newest and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        small.open(resume=True)
        assert small.state.step > newest
        assert small.holds() == {small.state.step}
        newest = small.state.step


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert children.run(children.train, SMALL, folder, STAGES) == 0
    return folder


def results(folder):
    run = RunFolder(folder)
    weights = {
        name: load_file(next(run.model(name).glob("*model.safetensors")))  # or an adapter's
        for name in ("sft", "rm", "policy")
    }
    return tiny.without_times(read_lines(run.metrics)), read_lines(run.samples), weights


def assert_equal_runs(one, other):
    (metrics, samples, weights), (metrics2, samples2, weights2) = results(one), results(other)
    assert metrics == metrics2 and samples == samples2
    for model, tensors in weights.items():
        assert tensors.keys() == weights2[model].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, weights2[model][name]), (model, name)


def test_killed_and_resumed_is_bit_equal_in_every_stage(unbroken, tmp_path):
    for kill in [("sft", 4), ("rm", 3), ("ppo", 3), ("eval", 4)]:
        assert children.run(children.train, SMALL, tmp_path, STAGES, True, kill) == -9
    written = [(line["stage"], line["step"]) for line in read_lines(RunFolder(tmp_path).metrics)]
    assert written[-1] == ("eval", 4)
    assert children.run(children.train, SMALL, tmp_path, STAGES, True) == 0
    assert_equal_runs(unbroken, tmp_path)


def test_nothing_is_trained_twice_when_everything_is_done(unbroken):
    before = {path: path.stat().st_mtime_ns for path in Path(unbroken).rglob("*.safetensors")}
    assert children.run(children.train, SMALL, unbroken, STAGES, True) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_sigterm_leaves_a_checkpoint_and_a_whole_run(unbroken, tmp_path):
    options = [*SMALL, "trainer.save_every=0"]
    process = children.start(children.train, options, tmp_path, STAGES)
    metrics = RunFolder(tmp_path).metrics
    while not any(line["stage"] == "ppo" for line in read_lines(metrics)):
        time.sleep(0.01)
        assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode not in (0, None)
    (step,) = steps_in(RunFolder(tmp_path).checkpoints("ppo"))
    assert max(x["step"] for x in read_lines(metrics) if x["stage"] == "ppo") == step
    assert children.run(children.train, options, tmp_path, STAGES, True) == 0
    assert_equal_runs(unbroken, tmp_path)


def test_sigterm_inside_a_step_is_obeyed_after_it(tmp_path):
    small = Small(tmp_path)
    log = MetricsLog(small.run, ("sft",), 0, ())
    small.config.trainer.save_every = 0
    said = r"SIGTERM after step 1 of sft; checkpoint at .*step_1"
    with pytest.raises(Stopped, match=said) as it, small.open(resume=False) as checkpoints:
        os.kill(os.getpid(), signal.SIGTERM)
        small.state.step = 1
        checkpoints.after_step(log, {}, Guard(5))
    assert it.value.code == 143 and steps(small) == [1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_newest_and_the_best_are_kept(tmp_path):
    small, scores = Small(tmp_path), [1.0, 5.0, None, 2.0, None, 5.0, 4.0, 0.0]
    log = MetricsLog(small.run, ("sft",), 0, ())
    with small.open(resume=False) as checkpoints:
        for step, score in enumerate(scores, 1):
            small.state.step = step
            metrics = {} if score is None else {"score": score}
            checkpoints.after_step(log, metrics, Guard(5))
            if step == 4:
                assert steps(small) == [2, 3, 4]
    assert steps(small) == [6, 7, 8]
    left = {path.name for path in small.run.checkpoints("sft").iterdir()}
    assert left == {"step_6", "step_7", "step_8"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path, capsys, damage):
    small = Small(tmp_path)
    with small.open(resume=False) as checkpoints:
        for step in (1, 2):
            small.state.step = step
            small.fill()
            checkpoints.save()
    folder = small.run.checkpoints("sft") / "step_2"
    victim = next(folder.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-100])
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("")
    again = Small(tmp_path)
    checkpoints = again.open(resume=True)
    said = capsys.readouterr().out
    assert "step_2 is damaged" in said and "passed over" in said and "goes on from" in said
    assert again.state.step == 1 and again.holds() == {1.0}
    again.state.step = 2  # the run comes to this step again and replaces it
    again.fill()
    checkpoints.save()
    third = Small(tmp_path)
    third.open(resume=True)
    assert third.state.step == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(small_disk, async_save):
    small = Small(small_disk, keep_last=50, async_save=async_save, size=20_000)  # 2 MB
    checkpoints = small.open(resume=False)
    with pytest.raises(CheckpointError, match=r"step 1 could not .*No space left.*no older one"):
        small.state.step = 1
        checkpoints.save()
        checkpoints.finish()
    small = Small(small_disk, keep_last=50, async_save=async_save, size=2_000)  # 200 kB
    checkpoints = small.open(resume=False)
    with pytest.raises(CheckpointError, match=r"No space left on device.*whole is step \d") as it:
        for step in range(1, 50):
            small.state.step = step
            small.fill()
            checkpoints.save()
            checkpoints.finish()
    assert "\n" not in str(it.value)
    last = small.state.step - 1
    assert last > 1 and steps(small) == list(range(1, last + 1))
    again = Small(small_disk, size=2_000)
    again.open(resume=True)
    assert again.state.step == last and again.holds() == {float(last)}


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_in_a_group_of_one_is_as_clear(small_disk, async_save):
    parallel.join_alone()
    try:
        small = Small(small_disk, async_save=async_save, size=20_000)
        checkpoints = small.open(resume=False)
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.save()
            checkpoints.finish()
    finally:
        parallel.stop()


def test_other_settings_are_one_clear_error(tmp_path):
    small = Small(tmp_path)
    with small.open(resume=False) as checkpoints:
        checkpoints.save()
    other = Small(tmp_path)
    other.state.parts["more"] = other.optimizer
    with pytest.raises(CheckpointError, match=r"differ in .* entries \(more"):
        other.open(resume=True)
    with pytest.raises(CheckpointError, match="step_0"):
        Small(tmp_path, size=100).open(resume=True)


def test_saving_in_the_background_keeps_the_moment(tmp_path):
    small = Small(tmp_path, async_save=True)
    with small.open(resume=False) as checkpoints:
        for step in (1, 2, 3):
            small.state.step = step
            small.fill()
            checkpoints.save()
            with torch.no_grad():  # training goes on while it is being written
                for tensor in small.numbers():
                    tensor.fill_(-1)
        checkpoints.end()
    assert steps(small) == [2, 3]
    again = Small(tmp_path)
    again.open(resume=True)
    assert again.holds() == {3.0}


def test_what_has_diverged_is_not_kept(tmp_path):
    small = Small(tmp_path)
    log = MetricsLog(small.run, ("sft",), 0, ())
    with small.open(resume=False) as checkpoints:
        small.state.step = 1
        checkpoints.after_step(log, {}, Guard(5))
        small.state.step = 2
        with torch.no_grad():
            small.model.weight[3, 3] = torch.nan
        with pytest.raises(Diverged, match=r"sft: step 2: the weights have run away; newest.* 1"):
            checkpoints.after_step(log, {}, Guard(5))
    assert steps(small) == [1]


def test_global_random_numbers_go_on(tmp_path):
    small = Small(tmp_path)
    with small.open(resume=False) as checkpoints:
        checkpoints.save()
    want = (random.random(), float(torch.rand(())))
    small.open(resume=True)
    assert (random.random(), float(torch.rand(()))) == want


def test_training_goes_on_while_checksums_of_a_background_save_are_taken(tmp_path, monkeypatch):
    threads, real = set(), files.checksum

    def checksum(path):
        if path.parent.name.startswith(".step_"):
            threads.add(threading.current_thread())
        return real(path)

    monkeypatch.setattr(files, "checksum", checksum)
    small = Small(tmp_path, async_save=True)
    checkpoints = small.open(resume=False)
    small.state.step += 1
    checkpoints.save()
    checkpoints.finish()
    assert threads and threading.main_thread() not in threads
    assert files.problem(small.run.checkpoints("sft") / "step_1") is None
