"""How a finished model meets the machine: FSDP on one rank, too; weights that wait elsewhere."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.trainer.models.test_models import SEQUENCES
from trainer import parallel
from trainer.models import loading
from trainer.models.policy import log_probabilities
from trainer.ppo import build, loop
from trainer.rollout.make import make_engine
from trainer.rollout.weights import whole_weights

BFLOAT16 = ("model.dtype=bfloat16", "rollout.logprob_bound=1.0")
PROMPTS = [[5, 6, 11, 12, 13, 3], [7, 5, 14, 11, 3]]


def test_weights_that_wait_in_the_cpus_memory_are_the_same(fresh):
    config, run = fresh(*BFLOAT16)
    source, found = str(run.model("sft")), []
    for offload in (False, True):
        policy = loading.load_policy(source, config, offload=offload)
        assert waits(policy) == offload
        assert all(isinstance(p, DTensor) and not p.requires_grad for p in policy.parameters())
        assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
        assert all(buffer.device == parallel.device() for buffer in policy.buffers())
        engine = make_engine(config, loading.load_tokenizer(source, config))
        engine.sync(policy)
        rollout = engine.generate(PROMPTS, 4, torch.Generator().manual_seed(0))
        logprobs = policy(rollout.sequences, log_probabilities()).logprobs
        weights = dict(whole_weights(policy, torch.bfloat16, 1 << 20))
        found.append((rollout.sequences.tokens, rollout.logprobs, logprobs, weights))
    one, other = found
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3]))
    assert one[3].keys() == other[3].keys() and len(one[3]) > 10
    assert all(torch.equal(a, other[3][name]) for name, a in one[3].items())


WAIT = [f"model.offload_{what}=true" for what in ("reference", "reward", "critic", "activations")]


@pytest.mark.parametrize("overrides", [BFLOAT16, ()], ids=["bfloat16", "float32"])
def test_an_iteration_does_not_depend_on_where_models_and_activations_wait(fresh, overrides):
    """float32 on a CPU: they are there already."""
    found, waiting = [], []
    for options in ((), WAIT):
        config, run = fresh(*overrides, "model.gradient_checkpointing=true", *options)
        t = build.Setup.of(config, run)
        models = (t.actors.reference, t.signals.scorer.model, t.actors.critic)
        waiting.append([waits(model) for model in models])
        metrics = loop.iteration(t, 0)
        found.append({k: v for k, v in metrics.items() if not k.startswith(("timing", "perf"))})
    assert found[0] == found[1]
    assert waiting == [[False] * 3, [bool(overrides)] * 3]


def waits(model):
    """Whether its weights do so in the CPU's memory."""
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    groups = [part._get_fsdp_state()._fsdp_param_group for part in sharded]
    params = [p for group in groups if group for p in group.fsdp_params]
    return bool(params) and all(p.offload_to_cpu for p in params)


def test_activations_wait_where_they_should(fresh, monkeypatch):
    """What the blocks are given is all that is kept, with the same gradients."""
    found, taken = [], []
    pack = torch.autograd.graph.save_on_cpu.__init__

    def counted(self, *arguments, **options):
        taken.append(1)
        pack(self, *arguments, **options)

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", counted)
    for option in ("false", "true"):
        config, run = fresh(
            "model.gradient_checkpointing=true", f"model.offload_activations={option}"
        )
        policy = loading.load_policy(str(run.model("sft")), config, trained=True).train()
        with torch.no_grad():
            policy(SEQUENCES, log_probabilities())
        assert not taken
        policy(SEQUENCES, log_probabilities()).logprobs.sum().backward()
        found.append([p.grad for p in policy.parameters()])
    assert len(taken) == 1
    assert all(g.norm() > 0 and torch.equal(g, other) for g, other in zip(*found))
