"""What is not finite teaches nothing and is never kept; too much of it stops the run."""

import os
import signal

import pytest
import torch

from tests.trainer import tiny
from trainer.__main__ import main
from trainer.ppo import build, loop
from trainer.runs.checkpoint import steps_in
from trainer.runs.faults import Diverged, Guard
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.runs.optim import Optimizer
from trainer.stages import registry, sft


@pytest.mark.parametrize("loss, grad", [(torch.nan, 1.0), (1.0, torch.inf), (torch.inf, torch.nan)])
def test_an_update_that_is_not_finite_changes_nothing(loss, grad, capsys):
    p = torch.nn.Parameter(torch.ones(3))
    guard = Guard(limit=2)
    optimizer = Optimizer([(0.1, [p])], guard=guard, name="policy")

    def update(loss, grad):
        p.grad = torch.tensor([0.0, grad, 0.0])
        optimizer.step(0, torch.tensor(loss))
        assert p.grad is None

    update(1.0, 1.0)
    assert guard.step_is_over("ppo", 1)
    before, moments = (
        p.detach().clone(),
        {k: v.clone() for k, v in optimizer.adamw.state[p].items()},
    )
    update(loss, grad)
    assert torch.equal(p, before) and guard.skipped == 1
    assert all(torch.equal(v, optimizer.adamw.state[p][k]) for k, v in moments.items())
    assert not guard.step_is_over("ppo", 2)
    assert "ppo: step 2: not finite: policy (" in capsys.readouterr().out
    update(1.0, 1.0)  # one good step begins the count anew
    assert guard.step_is_over("ppo", 3) and not torch.equal(p, before)
    update(loss, grad)
    update(loss, grad)
    assert guard.skipped == 3 and not guard.step_is_over("ppo", 4)
    update(loss, grad)
    with pytest.raises(Diverged, match="ppo: 2 steps in a row were not finite, the last 5: policy"):
        guard.step_is_over("ppo", 5)


def test_sigterm_between_stages_is_one_line(monkeypatch, tmp_path, capsys):
    def stage(name, *_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(registry, "run", stage)
    tiny_run = ["toy", *tiny.SMALL, "model.compile=true", "--output", str(tmp_path / "run")]
    assert main(["train", *tiny_run]) == 143
    out, err = capsys.readouterr()
    assert "SIGTERM outside the steps of a stage. --resume goes on" in err and err.count("\n") == 1
    assert "the first steps of a stage compile, minutes on a CPU" in out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Broken:
    """Reward function: NaN for one answer at the steps that are asked for."""

    def __init__(self, scorer, steps, value=torch.nan):
        self.scorer, self.steps, self.step, self.value = scorer, steps, 0, value

    def __call__(self, *given):  # evaluations and reference answers
        return self.broken(self.scorer(*given))

    def submit(self, *given):
        return self.scorer.submit(*given)

    def collect(self, submitted):
        return self.broken(self.scorer.collect(submitted))

    def broken(self, out):
        self.step += 1
        if self.step in self.steps:
            out["total"] = out["total"].clone()
            out["total"][3] = self.value
        return out


def broken(monkeypatch, config, run, steps, *value):
    of, made = build.Setup.of, []

    def with_broken_rewards(*arguments):
        t = of(*arguments)
        t.signals.scorer = Broken(t.signals.scorer, steps, *value)
        made.append(t)
        return t

    monkeypatch.setattr(build.Setup, "of", with_broken_rewards)
    loop.run(config, run)
    return made[0]


@pytest.mark.parametrize("performance", ["raw", "over_reference", "quantile"])
def test_a_reward_of_1e20_is_one_bad_answer_and_no_more(fresh, monkeypatch, capsys, performance):
    """Once it had made every later score exactly 0, without a word, and been kept for it."""
    options = ["eval.every=0", "ppo.steps=4", f"groups.performance={performance}"]
    config, run = fresh(*options)
    t = broken(monkeypatch, config, run, {3}, 1e20)
    assert 0.01 < float(t.signals.normaliser.std) < 100
    lines = [line for line in read_lines(run.metrics) if line["stage"] == "ppo"]
    assert all(abs(line["group/gap"]) < 50 for line in lines)
    assert abs(lines[-1]["objective/rlhf_reward"]) > 1e-3
    told = "left out of their scale" in capsys.readouterr().out
    assert told == (performance == "raw")  # else it was a reference answer's


def test_a_reward_that_is_not_finite_costs_its_step_alone(fresh, monkeypatch):
    options = ["eval.every=0", "ppo.steps=4", "trainer.save_every=1", "trainer.keep_last=9"]
    config, run = fresh(*options)
    broken(monkeypatch, config, run, {2})
    lines = [line for line in read_lines(run.metrics) if line["stage"] == "ppo"]
    assert [line["guard/skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["objective/scores"] is None and "policy/loss" not in lines[1]
    assert lines[2]["policy/grad_norm"] > 0
    assert sorted(steps_in(run.checkpoints("ppo"))) == [1, 3, 4]  # not of the step that was skipped


def test_many_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(fresh, monkeypatch):
    options = ["eval.every=0", "ppo.steps=9", "trainer.save_every=1", "trainer.max_skipped=3"]
    config, run = fresh(*options)
    with pytest.raises(Diverged, match=r"ppo: 3 steps in a row .*the last 5: rollout \(reward tot"):
        broken(monkeypatch, config, run, {3, 4, 5})
    assert sorted(steps_in(run.checkpoints("ppo"))) == [1, 2]
    assert not run.model("policy").exists()


def test_a_gradient_that_is_not_finite_in_fine_tuning(tmp_path, monkeypatch):
    real = sft.Optimizer.step

    def poisoned(self, step, loss):
        if step == 1:
            self.params[0].grad[0, 0] = torch.inf
        return real(self, step, loss)

    monkeypatch.setattr(sft.Optimizer, "step", poisoned)
    run = RunFolder(tmp_path)
    sft.run(tiny.config(tmp_path, "sft.steps=3", "trainer.save_every=1"), run)
    lines = read_lines(run.metrics)
    assert [line["guard/skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["sft/grad_norm"] is None and lines[2]["sft/grad_norm"] > 0
    assert sorted(steps_in(run.checkpoints("sft"))) == [1, 3]
