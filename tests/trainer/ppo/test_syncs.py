"""When the engine gets the policy's weights, and when it need not."""

import pytest
import torch

from trainer.models import loading
from trainer.ppo import build, loop
from trainer.rollout.engine import LogprobMismatch
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
