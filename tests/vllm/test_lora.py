"""The real vLLM on a CPU with adapters: they come alone, the base is asked without a sync, and one
that never arrives is found out before the first answer counts."""

import pytest
import torch

from tests.trainer.models.test_lora import move
from tests.vllm.test_engine import PROMPTS, difference, generate
from trainer.models import loading, shared
from trainer.models.backbone import trained
from trainer.models.policy import Policy
from trainer.ppo.forward import prove_adapter
from trainer.rollout.engine import LogprobMismatch
from trainer.rollout.make import make_engine

LORA = ["lora.rank=4", "data.max_prompt_tokens=400"]


@pytest.fixture
def setup(fresh):
    def make(*overrides):
        config, run = fresh(*LORA, *overrides)
        source = str(run.model("sft"))
        shape = run.model("sft") / "config.json"
        shape.write_text(shape.read_text().replace('_embeddings": 128', '_embeddings": 512'))
        policy = shared.policy(source, config, run)
        reference = Policy(policy.model, shared.Use(policy.through.backbone, None))
        return (
            config,
            policy,
            reference,
            make_engine(config, loading.load_tokenizer(source, config)),
        )

    return make


def adapter_bytes(policy):
    return sum(p.nbytes for p in trained(policy).values())


def test_adapters_come_alone_and_the_base_needs_no_sync(setup):
    config, policy, reference, engine = setup()
    engine.sync(policy, 0)
    whole = sum(p.nbytes for n, p in policy.named_parameters() if "lora_" not in n)
    assert engine.synced.bytes == whole + adapter_bytes(policy)
    assert difference(config, policy, engine, generate(engine)) < 1e-4
    for step in (1, 2, 3):
        move(policy)
        with pytest.raises(LogprobMismatch, match=r"look at sync"):
            difference(config, policy, engine, generate(engine))
        engine.sync(policy, step)
        assert engine.synced.bytes == adapter_bytes(policy) < whole / 4
        assert difference(config, policy, engine, generate(engine)) < 1e-4
        engine.sync(reference)
        assert engine.synced.bytes == 0
        assert difference(config, reference, engine, generate(engine)) < 1e-4
        engine.sync(policy, step)  # back again
        assert difference(config, policy, engine, generate(engine)) < 1e-4


@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_of_the_head_as_well(setup, sync):
    config, policy, _, engine = setup("lora.targets=[all-linear,lm_head]", f"lora.sync={sync}")
    move(policy)
    engine.sync(policy, 1)
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_merged_weights_arrive(setup):
    config, policy, reference, engine = setup(
        "lora.sync=merged", "lora.targets=[all-linear,embed_tokens,lm_head]"
    )
    for step in (1, 2):
        move(policy)
        engine.sync(policy, step)
        rollout = generate(engine)  # W + BA is rounded otherwise than W x + B A x
        assert difference(config, policy, engine, rollout, 1e-3) < 1e-3
    engine.sync(reference)
    assert difference(config, reference, engine, generate(engine)) < 1e-4


def test_a_whole_model_between_adapters(setup):
    """As the answers that stage rm compares."""
    config, policy, _, engine = setup()
    move(policy)
    engine.sync(policy, 1)
    generate(engine)
    other = loading.load_policy("toy", config)
    engine.sync(other)
    assert difference(config, other, engine, generate(engine)) < 1e-4
    engine.sync(policy, 1)
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_a_forgotten_adapter_is_found_out_before_it_has_learnt_anything(setup, monkeypatch):
    config, policy, _, engine = setup()
    before = {n: p.detach().clone() for n, p in trained(policy).items()}
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    prove_adapter(config, engine, policy, prompts)
    monkeypatch.setattr(engine.vllm, "use_adapter", lambda *_: 0)
    engine.vllm.adapter = None
    engine.sync(policy, 0)  # as it begins it does nothing: nobody would see that it is not there
    assert difference(config, policy, engine, generate(engine)) < 1e-4
    with pytest.raises(LogprobMismatch, match=r"the engine does not sample from the policy"):
        prove_adapter(config, engine, policy, prompts)
    assert all(torch.equal(p, before[n]) for n, p in trained(policy).items())
