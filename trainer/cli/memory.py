"""How much memory a run takes on each rank, from its models' shapes: nothing is loaded for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FP32, ADAM = 4, 8
"""Bytes a weight: masters, gradients and frozen models are float32, AdamW keeps two moments."""

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


def estimate(
    config: Config, stage: str, policy: Shape, reward: Shape, ranks: int
) -> dict[str, int]:
    """Bytes on one rank by component, at a stage's peak. Weights, gradients and optimiser state
    are spread over the ranks; activations and the generation cache are not.

    An estimate: the allocator's rounding and the libraries' own memory come on top.
    """
    shape = reward if stage in ("rm", "metarm") else policy
    trained = shape.backbone if stage in ("rm", "metarm") else shape.parameters
    out = {
        "weights": FP32 * trained / ranks,
        "gradients": FP32 * trained / ranks,
        "optimiser": ADAM * trained / ranks,
    }
    if stage == "metarm":  # of a round's reward model; its PPO is as stage ppo
        out["theta, kept aside"] = FP32 * trained / ranks
    if stage == "ppo":
        has_reward = config.reward.model_weight != 0
        out["reference"] = FP32 * policy.parameters / ranks
        out["reward model"] = FP32 * reward.backbone / ranks if has_reward else 0
        if config.ppo.has_critic or config.groups.inference in ("exact", "adversarial"):
            body = reward if config.model.critic == "reward" and has_reward else policy
            # Its gradients do not live at the same time as the policy's: the larger ones count.
            out["critic"] = (FP32 + ADAM) * body.backbone / ranks
            out["gradients"] = FP32 * max(policy.parameters, body.backbone) / ranks
        compute = 2 if config.model.dtype == "bfloat16" else 4
        vllm = config.rollout.engine == "vllm"
        if ranks > 1 or vllm:  # sampling wants the weights in one piece
            out["policy for sampling"] = compute * policy.parameters
        out["generation cache"] = _cache(config, policy)
        if vllm:  # what it takes besides is up to rollout.gpu_memory
            for name in ("policy for sampling", "generation cache"):
                out[name] /= config.rollout.tensor_parallel
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
    out["activations"] = _activations(config, shape, tokens)
    return {name: int(value) for name, value in out.items()}


def _activations(config: Config, shape: Shape, tokens: int) -> int:
    """What the backward pass of a micro-batch of at most `tokens` keeps. In bfloat16 the residual
    stream and the norms stay float32, as the master weights are: 4 bytes; what goes into matrix
    products: 2."""
    compute = 2 if config.model.dtype == "bfloat16" else 4
    residual = 4 * 4 * shape.hidden  # in and out of two norms
    products = compute * (
        2 * shape.hidden  # into q, k, v and into gate, up
        + 3 * shape.query  # q, q rotated, out of attention
        + 3 * shape.key_value  # k, k rotated, v
        + 4 * shape.intermediate  # gate, its activation, up, their product
    )
    layer = residual + products
    kept = 4 * shape.hidden * shape.layers + layer  # a layer's input; one layer recomputed
    if not config.model.gradient_checkpointing:
        kept = layer * shape.layers
    return min(config.trainer.tokens_per_microbatch, tokens) * kept


def _cache(config: Config, shape: Shape) -> int:
    compute = 2 if config.model.dtype == "bfloat16" else 4
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    cache = 2 * shape.layers * shape.key_value * compute * tokens
    return config.rollout.batch * (cache + 4 * shape.vocabulary)  # and one step's logits
