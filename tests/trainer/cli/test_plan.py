"""What a configuration takes, and whether it fits: by hand, and for the packaged ones."""

import pytest

from trainer.cli import memory, plan
from trainer.cli.check import Checked
from trainer.config import ConfigError, load

GIB = 2**30
HALF, SEVEN = (memory.published(f"Qwen/Qwen2.5-{size}B") for size in ("0.5", "7"))


def parts_of(*overrides, shape=HALF, stage="ppo", ranks=1, card=None):
    config = load("tldr_1gpu", [f"model.policy={shape.source}", *overrides])
    return memory.estimate(config, stage, shape, shape, ranks, card)


def test_adapters_on_one_base():
    parts = parts_of("lora.rank=16", "lora.critic_rank=8", "run.memory=0")
    # 24 layers of 896 wide: q and o 896 + 896, k and v 896 + 128, the MLP's three 896 + 4864
    layer = 2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)
    policy, critic = 16 * 24 * layer, 8 * 24 * layer
    assert parts["base"] == 2 * HALF.parameters
    assert parts["adapters"] == 4 * (policy + critic)
    assert parts["optimiser"] == 8 * (policy + critic)
    assert parts["gradients"] == 4 * policy and parts["reward adapter"] == 4 * policy
    assert not {"reference", "reward model", "critic", "policy for sampling"} & parts.keys()
    assert "gathered for compute" not in parts
    head = parts_of("lora.rank=16", "lora.targets=[all-linear,lm_head,embed_tokens]")
    assert head["gradients"] == 4 * (policy + 16 * 2 * (896 + 151936))
    two = parts_of("lora.rank=16", ranks=2)
    assert two["base"] == HALF.parameters and two["adapters"] == head["adapters"] - 4 * (
        16 * 2 * (896 + 151936)
    )
    assert two[memory.GATHERED] == 2 * HALF.parameters
    full = parts_of("lora.rank=16", "lora.sft=false", stage="sft")
    assert full["weights"] == 4 * HALF.parameters and "base" not in full


def test_four_bits_of_the_layers_and_not_of_embeddings_and_head():
    parts = parts_of("lora.rank=16", "lora.quantize=nf4", shape=SEVEN)
    ends = 2 * 152064 * 3584 + 3584  # and the last norm
    layers = SEVEN.parameters - ends
    assert parts["base, 4 bits"] == int(2 * ends + memory.NF4 * layers)
    assert parts["base, 4 bits"] < 5.3 * GIB


def test_lean_optimisers_and_models_that_wait():
    card = 80 * GIB
    whole = parts_of(card=card)
    lean = parts_of("trainer.optimizer=adamw8bit", "trainer.masters=bfloat16", card=card)
    assert lean["weights"] == whole["weights"] // 2 == 2 * HALF.parameters
    assert lean["gradients"] == whole["gradients"] // 2
    assert lean["optimiser"] == pytest.approx(whole["optimiser"] * 2.03125 / 8)
    away = parts_of("trainer.optimizer=offload", card=card)
    assert away["weights"] == away["optimiser"] == away["gradients"] == away["critic"] == 0
    waiting = parts_of(
        *(f"model.offload_{name}=true" for name in ("reference", "reward", "critic")), card=card
    )
    assert "reference" not in waiting and "reward model" not in waiting
    assert waiting["critic"] == 0 and waiting["weights"] == whole["weights"]


def test_vllm_takes_what_is_left_and_never_less_than_its_weights():
    card = 24 * GIB
    auto = ("rollout.engine=vllm", "rollout.gpu_memory=auto", "lora.rank=16")
    parts = parts_of(*auto, card=card)
    while_training = sum(parts.get(name, 0) for name in memory.WHILE_TRAINING)
    rest = sum(parts.values()) - parts["vLLM"] - while_training
    assert parts["vLLM"] == pytest.approx(memory.ROOM * card - rest, abs=8)
    small = parts_of("rollout.engine=vllm", "rollout.gpu_memory=0.01", card=card)
    assert small["vLLM"] > 2 * HALF.parameters + memory.VLLM_LEAST


@pytest.mark.parametrize(
    ("name", "overrides", "fits"),
    [
        ("tldr_24gb", [], True),
        ("tldr_lora_24gb", [], True),
        ("tldr_lora_48gb", [], True),
        ("tldr_nf4_24gb", [], True),
        ("hh_8gpu", [], True),
        ("hh_8gpu", ["rollout.engine=vllm"], True),
        ("tldr_1gpu", ["run.memory=24"], False),  # 1.5B, all weights
        ("tldr_lora_48gb", ["run.memory=24"], False),
        ("tldr_nf4_24gb", ["lora.quantize=none", "run.memory=16"], False),
        ("hh_8gpu", ["run.ranks=2"], False),
    ],
)
def test_what_fits_is_said(name, overrides, fits):
    config = load(name, overrides)
    shape = memory.published(config.model.policy)
    found = memory.plan(config, ("sft", "rm", "ppo"), shape)
    assert found.card == config.run.memory * GIB
    assert found.fits == fits
    assert found.needed == max(found.most.values())
    text = plan.describe(config, ("sft", "rm", "ppo"), Checked(policy=shape))
    assert ("DOES NOT FIT into" in text) != fits and ("\nfits into " in text) == fits
    assert ("adapters: rank 32" in text) == ("lora" in name or "nf4" in name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.gpu_memory=most"], "rollout.gpu_memory: is 'most'; want between 0 and 1, or"),
        (["rollout.gpu_memory=1.5"], "rollout.gpu_memory: is 1.5; want between 0 and 1"),
        (["rollout.gpu_memory=auto", "rollout.sleep=false"], "rollout.sleep: is False; want true"),
        (["lora.quantize=nf4"], "lora.rank: is 0; want 1 or more with lora.quantize=nf4"),
        (["lora.rank=4", "lora.quantize=nf4", "rollout.engine=vllm"], "rollout.engine: is 'vllm'"),
        (["lora.rank=4", "lora.targets=[all-linear,q_proj]"], "lora.targets: is ['all-linear', "),
        (["lora.rank=4", "trainer.optimizer=offload"], "trainer.optimizer: is 'offload'; want "),
        (["trainer.masters=bfloat16", "model.dtype=float32"], "trainer.masters: is 'bfloat16'"),
        (
            ["model.offload_activations=true", "model.gradient_checkpointing=false"],
            "model.gradient_checkpointing: is False; want true with model.offload_activations",
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load("tldr_1gpu", overrides)
    assert said in str(caught.value)
