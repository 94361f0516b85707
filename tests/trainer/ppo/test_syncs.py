"""When the engine gets the policy's weights, and when it need not."""

import pytest
import torch

from trainer.models import loading
from trainer.ppo import build, loop
from trainer.rollout.engine import LogprobMismatch
from trainer.runs.optim import Optimizer
from trainer.stages import policy

# bfloat16: weights are gathered for sampling, from one rank's shards as from many's.
SETTINGS = ("model.dtype=bfloat16", "groups.inference=none", "rollout.logprob_bound=1.0")


def test_an_evaluation_and_the_rollout_after_it_are_one_sync(fresh, monkeypatch):
    moves, looks = [], []
    gather, evaluated = loading.gather, loop.Ppo.evaluated
    monkeypatch.setattr(loading, "gather", lambda *some: moves.append(1) or gather(*some))
    monkeypatch.setattr(
        loop.Ppo, "evaluated", lambda self, *some: looks.append(1) or evaluated(self, *some)
    )
    config, run = fresh(*SETTINGS, "ppo.steps=3", "eval.every=1")
    policy.run(config, run)
    # before each of 3 steps an evaluation and a rollout, and at the end an evaluation
    assert len(looks) == 4 and len(moves) == 4


def test_a_forgotten_sync_is_found_out(fresh):
    """As a policy would be that has moved under the number of a step that has been synced."""
    config, run = fresh(*SETTINGS)
    t = build.Setup.of(config, run)
    loop.iteration(t, 0)
    with torch.no_grad():
        for p in t.actors.policy.parameters():
            p.mul_(1.5)
    with pytest.raises(LogprobMismatch, match=r"look at sync 1 \(the first, weights of step 0\)"):
        loop.iteration(t, 0)


def test_moments_are_there_before_an_engine_starts(fresh):
    """vLLM takes what is left of a card when it starts: moments would come 20 steps later."""
    config, run = fresh()
    t = build.Setup.of(config, run)
    assert t.actors.engine.synced is None
    for optimizer in (t.actors.policy_optimizer, t.actors.critic_optimizer):
        assert optimizer.params and optimizer.adamw.state.keys() == set(optimizer.params)
        for p in optimizer.params:
            state = optimizer.adamw.state[p]
            assert not state["exp_avg"].any() and state["exp_avg_sq"].shape == p.shape
            assert float(state["step"]) == 0


def test_moments_that_are_made_early_change_nothing():
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        optimizer = Optimizer([(0.1, layer.parameters())])
        if early:
            optimizer.materialise()
        for step in range(3):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step(step)
        found.append([*layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
