"""On two ranks what one rank finds: losses, gradients, groups, metrics, models, resumed runs."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import children, tiny
from tests.trainer.runs.test_checkpoint import SMALL, assert_equal_runs, results
from trainer import parallel
from trainer.batch.sequences import Sequences, shares
from trainer.config import ConfigError
from trainer.models import loading
from trainer.models.policy import log_probabilities
from trainer.ppo import build, loop
from trainer.runs.checkpoint import steps_in
from trainer.runs.faults import Guard, lost_rank
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.runs.optim import Optimizer


def test_shares_are_balanced_and_whole():
    lengths = [7, 100, 3, 50, 50, 1, 30, 4]
    parts = shares(lengths, 3)
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert max(sum(lengths[i] for i in part) for part in parts) == 100
    assert shares([5], 3)[1:] == [[], []]


PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
ADAPTERS = [
    "model.critic=policy",
    "lora.rank=4",
    "lora.critic_rank=2",
    "lora.targets=[all-linear,lm_head,embed_tokens]",
]


def move_adapters(backbone):
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if "lora_" in name:
                p += 0.05 * torch.randn(p.shape, generator=parallel.generator(name))


def gradients_of_an_iteration(models, output, overrides):
    """Of policy and critic, whole and in float64, with the metrics; written by rank 0."""
    run = RunFolder(output)
    if parallel.is_main():
        shutil.copytree(models, run.path / "models")
    parallel.barrier()
    options = ["ppo.minibatches=1", "ppo.ppo_epochs=1", "ppo.entropy_coef=0.01", *overrides]
    t = build.Setup.of(tiny.config(output, *options), run)
    if t.config.lora.active:  # as they begin, they do nothing
        move_adapters(t.actors.policy.through.backbone)
    found = {}

    def keep(name, optimizer):
        def step(*_):
            parallel.sum_gradients(optimizer.params)
            grads = [p.grad for p in optimizer.params if p.grad is not None]
            found[name] = torch.cat([parallel.whole(grad).flatten().double() for grad in grads])
            return found[name].norm()

        return step

    t.actors.policy_optimizer.step = keep("policy", t.actors.policy_optimizer)
    t.actors.critic_optimizer.step = keep("critic", t.actors.critic_optimizer)
    metrics = loop.iteration(t, 0)
    if parallel.is_main():
        torch.save((found, metrics), run.path / "found")


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.prompts_per_step=32", "trainer.tokens_per_microbatch=100"],
        [
            "ppo.prompts_per_step=16",
            "groups.inference=adversarial",
            "groups.draw=gdro",
            "kl.estimator=exact",
        ],
        # one sequence: the other rank has none
        ["ppo.prompts_per_step=1", "groups.inference=none", "model.gradient_checkpointing=true"],
        ["trainer.replicas=2", "model.offload_reference=true", "model.packing=on"],
        ["rollout.top_p=0.9", "kl.estimator=exact"],
        pytest.param(
            ["model.gradient_checkpointing=true", "kl.estimator=exact", *ADAPTERS], marks=PEFT
        ),
        # one sequence: the other rank has none
        pytest.param(["ppo.prompts_per_step=1", "groups.inference=none", *ADAPTERS], marks=PEFT),
    ],
    ids=[
        "exact",
        "adversarial",
        "empty rank",
        "replicas",
        "top-p",
        "adapters",
        "adapters, empty rank",
    ],
)
def test_gradients_and_metrics_do_not_depend_on_the_number_of_ranks(base, tmp_path, overrides):
    found = []
    for count in (1, 2):
        output = tmp_path / str(count)
        arguments = (gradients_of_an_iteration, base.path / "models", output, overrides)
        assert children.run_ranks(count, *arguments) == [0] * count
        found.append(torch.load(output / "found"))
    (gradients, metrics), (gradients2, metrics2) = found
    for name, one in gradients.items():
        assert one.norm() > 0
        error = (gradients2[name] - one).norm() / one.norm()
        assert error < 1e-5, (name, error)
    assert metrics.keys() == metrics2.keys()
    assert max(m["rollout/logprob_diff_max"] for m in (metrics, metrics2)) < 1e-4
    for name, value in metrics.items():
        if not name.startswith(("timing", "perf")):
            assert metrics2[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def one_rank_meets_nan():
    p = torch.nn.Parameter(torch.ones(3))
    guard = Guard(limit=2)
    optimizer = Optimizer([(0.1, [p])], guard=guard, name="policy")
    for step, bad in enumerate([False, True, False]):
        p.grad = torch.ones(3)
        before = p.detach().clone()
        loss = torch.nan if bad and parallel.rank() == 1 else 1.0
        optimizer.step(step, torch.tensor(loss))
        assert torch.equal(before, p) == bad
        assert guard.step_is_over("ppo", step) != bad
    assert guard.skipped == 1


def test_what_is_not_finite_on_one_rank_is_skipped_on_all():
    assert children.run_ranks(2, one_rank_meets_nan) == [0, 0]


@pytest.fixture
def store():
    """As torchrun has one: it outlives the ranks."""
    return torch.distributed.TCPStore("localhost", 0, is_master=True)


def join_store(port):
    parallel.stop()
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def waits(port, timeout, gave_up):
    """The first rank's download takes longer than any collective may; then one rank is as late."""
    join_store(port)
    began = time.monotonic()
    parallel.start(timeout, first=lambda: time.sleep(1.5 * timeout))
    assert time.monotonic() - began > 1.5 * timeout
    parallel.barrier()
    assert all(found == timedelta(seconds=timeout) for found in timeouts())
    began = time.monotonic()
    if parallel.rank() == 0:
        with pytest.raises(RuntimeError) as error:
            parallel.barrier()
        gave_up.touch()
        assert "Timed out" in lost_rank(error.value)
    while not gave_up.exists():
        time.sleep(0.1)
    assert timeout / 2 < time.monotonic() - began < 10 * timeout


def timeouts():
    """Of the group of all, one for objects, and those of a mesh."""
    groups = [torch.distributed.group.WORLD, parallel.cpu_group()]
    groups += parallel.mesh(2).get_all_groups()
    return [each._get_backend(torch.device("cpu")).options._timeout for each in groups]


def test_a_download_may_take_longer_than_ranks_wait_for_each_other(store, tmp_path):
    assert children.run_ranks(2, waits, store.port, 5, tmp_path / "gave up") == [0, 0]


def cannot(port):
    join_store(port)

    def fail():
        assert os.environ["LOCAL_RANK"] == "0"
        raise ConfigError("cannot be fetched", "model.policy")

    with pytest.raises(ConfigError, match=r"^model.policy: cannot be fetched$"):
        parallel.start(first=fail)


def test_what_cannot_be_downloaded_is_an_error_on_every_rank(store):
    assert children.run_ranks(2, cannot, store.port) == [0, 0]


def test_sigterm_to_one_rank_is_obeyed_by_all_after_the_step(tmp_path):
    stop = ("sft", 2, signal.SIGTERM, 1)
    options = [*SMALL, "trainer.save_every=0"]
    codes = children.run_ranks(2, children.train, options, tmp_path, ["sft"], False, stop)
    assert codes == [1, 1]  # an exception here; on the command line it is one line and code 143
    assert list(steps_in(RunFolder(tmp_path).checkpoints("sft"))) == [2]
    assert [line["step"] for line in read_lines(RunFolder(tmp_path).metrics)] == [1, 2]


def gradient_of_a_policy(folder, output, dtype, budget):
    """Of the log-probabilities of made-up answers, whole and in float64; written by rank 0."""
    config = tiny.config(output, f"model.dtype={dtype}")
    policy = loading.load_policy(str(folder), config, trained=True).train()
    draw = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(5, 30, (n,), generator=draw).tolist() for n in range(2, 26) for _ in (0, 1)
    ]
    sequences = Sequences.of(rows[::2], rows[1::2])
    for piece, weight in sequences.pieces(budget):
        stats = policy(sequences.rows(piece), log_probabilities())
        (weight * stats.logprobs.sum() / sequences.count).backward()
    grads = [parallel.whole(p.grad).flatten().double() for p in policy.parameters()]
    if parallel.is_main():
        torch.save(torch.cat(grads), output)


def test_ranks_and_micro_batches_in_bfloat16_are_within_its_own_error(base, tmp_path):
    """One path: one rank and two, one batch and many, compute the same to rounding; and bfloat16's
    rounding is what it is."""
    found = {}
    for name, ranks, dtype, budget in (
        ("exact", 1, "float32", 10_000),
        ("one", 1, "bfloat16", 10_000),
        ("pieces", 1, "bfloat16", 60),
        ("two", 2, "bfloat16", 10_000),
    ):
        output = tmp_path / name
        arguments = (gradient_of_a_policy, base.model("sft"), output, dtype, budget)
        assert children.run_ranks(ranks, *arguments) == [0] * ranks
        found[name] = torch.load(output)
    exact = found.pop("exact")
    errors = {name: float((each - exact).norm() / exact.norm()) for name, each in found.items()}
    assert all(1e-4 < error < 0.03 for error in errors.values()), errors
    apart = {name: float((found[name] - found["one"]).norm() / exact.norm()) for name in found}
    assert all(distance <= 1.5 * errors["one"] for distance in apart.values()), (apart, errors)


def test_bfloat16_on_two_ranks(base, tmp_path):
    """Masters and gradients stay float32; sampling sees the weights that training computes with."""
    options = ["model.dtype=bfloat16", "rollout.logprob_bound=0.2", "ppo.prompts_per_step=8"]
    arguments = (gradients_of_an_iteration, base.path / "models", tmp_path / "run", options)
    assert children.run_ranks(2, *arguments) == [0, 0]
    gradients, metrics = torch.load(tmp_path / "run" / "found")
    assert all(each.isfinite().all() and each.norm() > 0 for each in gradients.values())
    assert metrics["rollout/logprob_diff_max"] < 0.1


@pytest.mark.slow
def test_torchrun_goes_on_from_the_newest_checkpoint_when_a_rank_dies(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys\n"
        "from tests.trainer import children\n"
        "from trainer.__main__ import main\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    children.kill_at('sft', 3)\n"
        "sys.exit(main())\n"
    )
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    config = [*tiny.SMALL, *SMALL, "run.stages=[sft]", "trainer.progress=true"]
    line = [sys.executable, *launch, "--standalone", script, "train", "toy", *config]
    root = Path(__file__).parents[3]  # for the script, which lies elsewhere
    done = subprocess.run(
        [*line, "--output", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout and "step_2" in done.stdout
    run = RunFolder(tmp_path / "run")
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3, 4, 5]
    children.train([*SMALL, "run.stages=[sft]"], tmp_path / "one", ["sft"])
    one = load_file(tmp_path / "one" / "models" / "sft" / "model.safetensors")
    for name, tensor in load_file(run.model("sft") / "model.safetensors").items():
        torch.testing.assert_close(tensor, one[name], atol=1e-4, rtol=1e-4)


def test_killed_and_resumed_on_two_ranks_and_on_one(tmp_path):
    options = [*SMALL, "sft.steps=3", "rm.steps=3", "trainer.save_every=2"]
    whole, broken, fewer = (tmp_path / name for name in ("whole", "broken", "fewer"))
    stages = ("sft", "rm", "ppo")
    assert children.run_ranks(2, children.train, options, whole, stages) == [0, 0]
    in_background = [*options, "trainer.async_save=true"]
    codes = children.run_ranks(2, children.train, in_background, broken, stages, False, ("ppo", 4))
    assert codes[0] == -9 and codes[1] not in (0, -9)  # the other ends by itself
    shutil.copytree(broken, fewer)
    assert children.run_ranks(2, children.train, options, broken, stages, True) == [0, 0]
    assert_equal_runs(whole, broken)
    assert children.run(children.train, options, fewer, stages, True) == 0
    metrics, _, weights = results(fewer)
    one, _, weights2 = results(whole)
    for line, line2 in zip(metrics, one):
        for name in line2:
            if name.startswith("objective"):
                assert line[name] == pytest.approx(line2[name], rel=1e-3, abs=1e-3), name
    for name, tensor in weights["policy"].items():
        torch.testing.assert_close(tensor, weights2["policy"][name], atol=1e-3, rtol=1e-3)
