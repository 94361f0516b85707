"""How much memory a run takes on each rank, from its models' shapes: nothing is loaded for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FP32, ADAM = 4, 8
"""Bytes a trained weight: its master and its gradient are float32, AdamW keeps two moments."""

WHILE_SAMPLING = ("vLLM", "generation cache")
WHILE_TRAINING = ("gradients", "gathered for compute", "activations")
"""Components that never live at the same time, where the engine rests while the trainer trains."""

# Published architectures that the packaged configurations name, so that their dry run can plan
# without a network: layers, hidden, query width, key/value width, intermediate, vocabulary, tied.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (24, 896, 896, 128, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 1536, 256, 8960, 151936, True),
    "Qwen/Qwen2.5-7B": (28, 3584, 3584, 512, 18944, 152064, False),
    "meta-llama/Llama-3.2-1B": (16, 2048, 2048, 512, 8192, 128256, True),
    "meta-llama/Llama-3.1-8B": (32, 4096, 4096, 1024, 14336, 128256, False),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on."""

    source: str
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    vocabulary: int
    backbone: int
    """Parameters without the language-model head; with input embeddings."""
    head: int
    """Parameters of the head; 0 where it is tied to the embeddings."""

    @property
    def parameters(self) -> int:
        return self.backbone + self.head

    def gathered(self, head: bool) -> int:
        """What FSDP has in one piece at a time: a block, and the root (embeddings, norm, head)."""
        root = (self.vocabulary + 1) * self.hidden
        return (self.backbone - root) // self.layers + root + (self.head if head else 0)


def shape_of(config: PreTrainedConfig, source: str) -> Shape:
    """From a transformers configuration; parameters are counted on a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(each.numel() for each in model.parameters())
    backbone = sum(each.numel() for each in model.base_model.parameters())
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        source=source,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * width,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * width,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        backbone=backbone,
        head=whole - backbone,
    )


def published(source: str) -> Shape:
    layers, hidden, query, key_value, intermediate, vocabulary, tied = PUBLISHED[source]
    biases = query + 2 * key_value if "Qwen2.5" in source else 0
    block = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * intermediate
    backbone = vocabulary * hidden + layers * (block + biases + 2 * hidden) + hidden
    return Shape(
        source=source,
        layers=layers,
        hidden=hidden,
        query=query,
        key_value=key_value,
        intermediate=intermediate,
        vocabulary=vocabulary,
        backbone=backbone,
        head=0 if tied else vocabulary * hidden,
    )


def planned_ranks(config: Config) -> int:
    """How many the plan is for."""
    return config.run.ranks or int(os.environ.get("WORLD_SIZE", "1"))


def card_bytes() -> int | None:
    """Memory of this machine's GPU, if it has one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def estimate(
    config: Config, stage: str, policy: Shape, reward: Shape, ranks: int, card: int | None = None
) -> dict[str, int]:
    """Bytes on one rank by component. Weights, gradients and optimiser state are spread over the
    ranks; activations and the generation cache are not. `card`: a GPU's memory, where it is known.

    An estimate: the allocator's rounding and the libraries' own memory come on top.
    """
    judges = stage in ("rm", "metarm")
    shape = reward if judges else policy
    trained = shape.backbone if judges else shape.parameters
    compute = _compute(config, stage)
    out: dict[str, float] = {
        "weights": FP32 * trained / ranks,
        "gradients": FP32 * trained / ranks,
        "optimiser": ADAM * trained / ranks,
    }
    if stage == "metarm":  # of a round's reward model; its PPO is as stage ppo
        out["theta, kept aside"] = FP32 * trained / ranks
    sharded = ranks > 1 or card is not None or compute < FP32  # as parallel.shards
    if sharded:
        out["gathered for compute"] = compute * shape.gathered(head=not judges)
    if stage == "ppo":
        has_reward = config.reward.model_weight != 0
        if not config.model.offload_reference:
            out["reference"] = compute * policy.parameters / ranks
        out["reward model"] = compute * reward.backbone / ranks if has_reward else 0
        if config.ppo.has_critic or config.groups.has_head:
            body = reward if config.model.critic == "reward" and has_reward else policy
            # Its gradients do not live at the same time as the policy's: the larger ones count.
            out["critic"] = (FP32 + ADAM) * body.backbone / ranks
            out["gradients"] = FP32 * max(policy.parameters, body.backbone) / ranks
        out |= _sampling(config, policy, ranks, sharded, card)
    batch = {
        "sft": config.sft.batch,
        "rm": 2 * config.rm.batch,
        "metarm": max(2 * config.rm.batch, config.metarm.meta_batch * config.metarm.samples),
        "ppo": config.ppo.sequences_per_step,
    }
    answer = (
        config.data.max_answer_tokens if stage != "ppo" else 0
    ) or config.rollout.max_new_tokens
    tokens = batch[stage] // ranks * (config.data.max_prompt_tokens + answer)
    out["activations"] = _activations(config, stage, shape, tokens)
    return {name: int(value) for name, value in out.items()}


def at_once(config: Config, parts: dict[str, int]) -> int:
    """The most of it that lives at the same time."""
    sampling = sum(parts.get(name, 0) for name in WHILE_SAMPLING)
    training = sum(parts.get(name, 0) for name in WHILE_TRAINING)
    if "vLLM" in parts and not config.rollout.sleep:
        return sum(parts.values())
    return sum(parts.values()) - min(sampling, training)


def _sampling(
    config: Config, policy: Shape, ranks: int, sharded: bool, card: int | None
) -> dict[str, float]:
    """Of the engine: the weights in one piece, and a cache."""
    rollout, compute = config.rollout, _compute(config, "ppo")
    if rollout.engine == "hf":
        whole = {"policy for sampling": compute * policy.parameters} if sharded else {}
        return {**whole, "generation cache": _cache(config, policy, rollout.batch)}
    if card is not None:
        return {"vLLM": rollout.gpu_memory * card}
    share = rollout.tensor_parallel
    rows = min(rollout.max_num_seqs, -(-config.ppo.sequences_per_step * share // ranks))
    return {
        "policy for sampling": compute * policy.parameters / share,
        "generation cache": _cache(config, policy, rows) / share,
    }


def _compute(config: Config, stage: str) -> int:
    """Bytes of a number that a stage computes with."""
    dtype = config.metarm.dtype if stage == "metarm" else config.model.dtype
    return 2 if dtype == "bfloat16" else 4


def _activations(config: Config, stage: str, shape: Shape, tokens: int) -> int:
    """What the backward pass of a micro-batch of at most `tokens` keeps. Norms compute in float32,
    everything else in the dtype of compute."""
    compute = _compute(config, stage)
    norms = 2 * (FP32 + compute) * shape.hidden  # into each, and normalised
    products = compute * (
        2 * shape.hidden  # into q, k, v and into gate, up
        + 3 * shape.query  # q, q rotated, out of attention
        + 3 * shape.key_value  # k, k rotated, v
        + 4 * shape.intermediate  # gate, its activation, up, their product
    )
    layer = norms + products
    # with checkpointing a layer's input, and one layer recomputed
    kept = compute * shape.hidden * shape.layers + layer
    if not config.model.gradient_checkpointing:
        kept = layer * shape.layers
    return min(config.trainer.tokens_per_microbatch, tokens) * kept


def _cache(config: Config, shape: Shape, rows: int) -> int:
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    cache = 2 * shape.layers * shape.key_value * _compute(config, "ppo") * tokens
    return rows * (cache + 4 * shape.vocabulary)  # and one step's logits
