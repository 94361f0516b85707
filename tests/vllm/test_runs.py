"""Whole runs that sample with vLLM: what befalls it, what they learn, what they keep of memory."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import children, tiny
from tests.vllm.conftest import SHAPE, config
from trainer import parallel
from trainer.ppo import build, loop
from trainer.report.table import evaluations
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines

SETTINGS = [
    *tiny.SMALL,
    *SHAPE,
    "rollout.engine=vllm",
    "rollout.max_num_seqs=64",
    "ppo.steps=5",
    "ppo.prompts_per_step=8",
    "ppo.samples_per_prompt=2",
    "eval.every=4",
    "trainer.save_every=1",
]
PATIENCE = 1800  # seconds, on a slow and busy machine: only what hangs takes longer


def command(output, settings, resume=False, fault=None):
    """`gi ppo toy ...` with its exit code, its stderr in a file, and something that befalls it."""
    from trainer.__main__ import main

    stderr = os.open(Path(output, "stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    if fault:
        befall(*fault)
    resumed = ["--resume"] if resume else []
    sys.exit(main(["ppo", "toy", *settings, "--output", str(output), *resumed]))


def befall(at, what):
    """In the middle of generating answers with the weights of step `at`."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from trainer.rollout.vllm import VllmEngine

    sync, step = VllmEngine.sync, LLMEngine.step
    steps = [-1]

    def sync_and_count(self, policy, of=None):
        sync(self, policy, of)
        steps[0] = 0 if of == at else -1

    def step_or_not(self):
        if steps[0] >= 0:
            steps[0] += 1
        if steps[0] == 3:
            what()
        return step(self)

    VllmEngine.sync, LLMEngine.step = sync_and_count, step_or_not


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")


def hang():
    time.sleep(1000)


def run(*arguments) -> int:
    return children.wait([children.start(command, *arguments)], PATIENCE)[0]


def test_killed_broken_and_hung_in_the_middle_of_generating(base, tmp_path):
    """Each ends in words, and the run goes on from there to the numbers of an unbroken one."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        shutil.copytree(base.path / "models", folder / "models")
    assert run(unbroken, SETTINGS) == 0
    assert "Traceback" not in (unbroken / "stderr").read_text()  # nor at its end

    assert run(broken, SETTINGS, False, (1, die)) == -signal.SIGKILL
    assert run(broken, SETTINGS, True, (2, fail)) == 1
    said = (broken / "stderr").read_text()
    assert "in fail" in said  # vLLM's traceback, and then one line
    assert said.strip().splitlines()[-1] == (
        "gi: rollout.engine=vllm: the engine of rank 0 could not generate: RuntimeError: CUDA "
        "error: an illegal memory access was encountered more of it. Checkpoints are intact: "
        "--resume goes on from the newest"
    )
    assert run(broken, [*SETTINGS, "rollout.timeout=20"], True, (3, hang)) == 1
    said = (broken / "stderr").read_text()
    assert "in hang" in said
    assert "gi: rollout.timeout=20: vLLM on rank 0: no sign of life" in said

    assert run(broken, SETTINGS, True) == 0
    one, other = RunFolder(unbroken), RunFolder(broken)
    lines = tiny.without_times(read_lines(one.metrics))
    assert [line["step"] for line in lines if line["stage"] == "ppo"] == [1, 2, 3, 4, 5]
    assert lines == tiny.without_times(read_lines(other.metrics))
    weights, weights2 = (load_file(r.model("policy") / "model.safetensors") for r in (one, other))
    assert all(torch.equal(tensor, weights2[name]) for name, tensor in weights.items())


# --- several ranks ---


def iterate(models, output, share):
    """Two iterations; the second samples with what the first has learnt."""
    folder = RunFolder(output)
    if parallel.is_main():
        shutil.copytree(models, folder.path / "models")
    parallel.barrier()
    made = config(output, f"rollout.tensor_parallel={share}", "ppo.prompts_per_step=8")
    t = build.Setup.of(made, folder)
    lines = [loop.iteration(t, step) for step in (0, 1)]
    if parallel.is_main():
        torch.save(lines, folder.path / "lines")


@pytest.mark.parametrize("share", [1, 2])
def test_two_ranks_with_an_engine_each_or_one_together(base, tmp_path, share):
    found = []
    for ranks in (1, 2):
        arguments = (base.path / "models", tmp_path / str(ranks), share if ranks == 2 else 1)
        processes = children.ranks(ranks, iterate, *arguments)
        assert children.wait(processes, PATIENCE) == [0] * ranks
        found.append(torch.load(tmp_path / str(ranks) / "lines"))
    for one, two in zip(*found):
        assert two["rollout/logprob_diff_max"] < 1e-4
        for name in ("objective/scores", "objective/kl", "rollout/length", "policy/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


# --- memory ---


def note_memory(output, settings):
    """The resident set after each step, in pages."""
    write, sizes = MetricsLog.write, []

    def write_and_look(self, stage, step, *arguments, **labels):
        write(self, stage, step, *arguments, **labels)
        if stage == "ppo":
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))

    MetricsLog.write = write_and_look
    loop.run(config(output, *settings), RunFolder(output))
    torch.save(sizes, Path(output, "sizes"))


def test_memory_stays_flat_over_100_steps(base, tmp_path):
    """After 150 others: about 130 of them touch blocks of the cache for the first time."""
    shutil.copytree(base.path / "models", tmp_path / "models")
    settings = ["ppo.steps=270", "eval.every=0", "trainer.save_every=0"]
    process = children.start(note_memory, tmp_path, settings)
    assert children.wait([process], PATIENCE) == [0]
    sizes = torch.tensor(torch.load(tmp_path / "sizes"), dtype=torch.float64)
    early, late = sizes[150:170].mean(), sizes[-20:].mean()
    assert late < 1.005 * early, (early, late)


# --- learning ---

TOY = [
    "sft.steps=150",
    "rm.steps=80",
    "rm.pairs=2048",
    "ppo.steps=40",
    "eval.every=5",
    "eval.samples_per_domain=64",
    "trainer.progress=false",
    "trainer.save_every=0",
    "baselines={}",
]


def stages(output, command, settings):
    """`gi train toy` of some stages, or `gi ppo toy`."""
    from trainer.__main__ import main

    sys.exit(main([command, "toy", *TOY, *settings, "--output", str(output)]))


def test_the_toy_run_learns_what_it_learns_with_the_other_engine(tmp_path):
    """Proxy over the second half of the run, against the same reward model. Single evaluations
    scatter by a fifth of what PPO gains, and so do processors that round otherwise; an engine that
    samples from anything else gains nothing, or is found out."""

    def child(*arguments):
        return children.wait([children.start(stages, *arguments)], PATIENCE)[0]

    assert child(tmp_path / "hf", "train", ["run.stages=[sft,rm]"]) == 0
    shutil.copytree(tmp_path / "hf" / "models", tmp_path / "vllm" / "models")
    gains = {}
    for engine in ("hf", "vllm"):
        run = RunFolder(tmp_path / engine)
        run.config.unlink(missing_ok=True)
        assert child(run.path, "ppo", [f"rollout.engine={engine}"]) == 0
        (before,) = evaluations(run, "sft")
        after = [line["eval/proxy"] for line in evaluations(run, "policy")[4:]]
        gains[engine] = sum(after) / len(after) - before["eval/proxy"]
    assert gains["hf"] > 0.1
    assert gains["vllm"] == pytest.approx(gains["hf"], rel=0.5)
