"""Progress where there is no terminal, and how much of a GPU a step has used."""

import re

import pytest
import torch
from torch import nn

from tests.trainer import tiny
from trainer.ppo.loop import Ppo
from trainer.runs import console, log, utilisation
from trainer.runs.folder import RunFolder
from trainer.stages import sft


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines(capsys, clock, steps=10, start=0, seconds=7.0, every=30.0):
    metrics = {"perf/tokens_per_second": 3204.4, "perf/mfu": 0.412}
    with console.progress("ppo", steps, start, True, every) as show:
        for step in range(start, steps):
            clock[0] += seconds
            show({"kl": 0.25 * step}, metrics if step % 2 else {})
    return capsys.readouterr().out.splitlines()


def test_a_line_every_so_many_seconds(capsys, clock):
    assert lines(capsys, clock) == [
        "ppo 1/10  kl 0  7 s a step  63 s left",
        "ppo 6/10  kl 1.25  3,204 tokens/s  MFU 41%  7 s a step  28 s left",
        "ppo 10/10  kl 2.25  3,204 tokens/s  MFU 41%  7 s a step  done in 70 s",
    ]


def test_a_run_that_goes_on_counts_its_own_time(capsys, clock):
    said = lines(capsys, clock, steps=1000, start=990, seconds=3600.0)
    assert len(said) == 10 and said[0].startswith("ppo 991/1000")
    assert said[0].endswith("3.6e+03 s a step  9.0 h left")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"),
                          (5400, "1.5 h"), (200_000, "2.3 days")],
)  # fmt: skip
def test_durations(seconds, said):
    assert console.duration(seconds) == said


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GH200 480GB", 989e12),
        ("Tesla T4", None), ("NVIDIA L40", None), ("NVIDIA A10G", None), ("", None),
    ],
)  # fmt: skip
def test_a_cards_peak_is_known_or_not_shown(card, peak):
    assert utilisation.peak(card) == peak


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.body = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token(tied):
    model = Tied(tied)
    assert utilisation.forward(model) == 2 * (16 + 40)  # looked up: nothing
    assert utilisation.training(model) == 6 * (16 + 40)
    model.head.weight.requires_grad_(False)
    assert utilisation.training(model) == 6 * 16 + 4 * 40
    assert utilisation.mfu(utilisation.forward(model), 1e3, 1e6) == pytest.approx(0.112)
    assert utilisation.mfu(112, 1e3, None) is None
    assert utilisation.forward(None) == 0


def test_a_run_logs_it_where_the_peak_is_known(tmp_path, monkeypatch, capsys):
    assert utilisation.peak_here("bfloat16") is None or torch.cuda.is_available()
    monkeypatch.setattr(utilisation, "peak_here", lambda dtype: 1e12 if dtype == "float32" else 0)
    config = tiny.config(
        tmp_path, "sft.steps=2", "trainer.progress=true", "trainer.progress_seconds=0"
    )
    sft.run(config, RunFolder(tmp_path))
    for line in log.read_lines(RunFolder(tmp_path).metrics):
        per_token = line["perf/mfu"] * 1e12 / line["perf/tokens_per_second"]
        assert 6 * 20_000 < per_token < 6 * 30_000  # the policy's weights, but for its embeddings
    assert re.search(
        r"sft 2/2  loss [\d.]+  [\d,]+ tokens/s  MFU \d+%  .* done in", capsys.readouterr().out
    )


def test_operations_of_a_ppo_step(fresh):
    config, run = fresh("ppo.ppo_epochs=3")
    stage = Ppo(config, run)
    actors, reward = stage.t.actors, stage.t.signals.scorer.model
    policy, critic = (utilisation.forward(each) / 2 for each in (actors.policy, actors.critic))
    assert policy > critic > utilisation.forward(reward) / 4 > 0
    seen = 3 * policy + critic + utilisation.forward(reward) / 2  # sampled, looked at, held on to
    assert stage.operations() == pytest.approx(2 * seen + 3 * 6 * (policy + critic))
