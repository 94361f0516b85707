"""Baselines where there is one device for all: one after another, each with the card for itself."""

import weakref

import pytest

from trainer.ppo import build
from trainer.runs.log import read_lines
from trainer.stages import baselines, policy

TWO = "baselines={ppo: [groups.inference=none], weights: [groups.beta=1]}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bfloat16: with FSDP's hooks
def test_the_models_of_the_run_before_are_freed(fresh, monkeypatch, dtype):
    monkeypatch.setattr(baselines, "beside", lambda: False)
    monkeypatch.setattr(baselines, "_start", None)
    made, alive = [], []
    actors_of = build.Actors.of

    def of(*arguments):
        alive.append(sum(model() is not None for model in made))
        actors = actors_of(*arguments)
        made.extend(weakref.ref(m) for m in (actors.policy, actors.reference, actors.critic) if m)
        return actors

    monkeypatch.setattr(build.Actors, "of", of)
    bound = "rollout.logprob_bound=1.0"
    config, run = fresh("ppo.steps=1", "groups.focus=0", f"model.dtype={dtype}", bound, TWO)
    policy.run(config, run)
    assert alive == [0, 0, 0]
    for name in ("ppo", "weights"):
        folder = run.baseline(name)
        assert folder.config.is_file() and (folder.model("policy") / "model.safetensors").is_file()
        ours, theirs = (
            next(line for line in read_lines(each.metrics) if line["stage"] == "ppo")
            for each in (run, folder)
        )
        assert ours["objective/scores"] == theirs["objective/scores"]
