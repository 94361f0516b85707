"""How much memory a run takes on each rank, from its models' shapes: nothing is loaded for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FP32, ADAM = 4, 8
"""Bytes a trained weight: its master and its gradient are float32, AdamW keeps two moments."""
ADAM_8BIT = 2 + 2 * 4 / 256
"""Codes, and a scale for each block of them: runs/adam.py."""
NF4 = 0.5 + (1 + 4 / 256) / 64
"""A weight's code, and its block's scale in 8 bits, with a scale of those."""
LOGIT, DRAWN = 4, 24
"""Bytes a logit of those from which a token is drawn, and what rollout/hf.draw makes of it: its
log-probability, and 46 bits of its probability and of the sum up to there."""
VLLM_LEAST = 2**30
"""What an engine takes beside its weights and a cache: graphs, workspaces."""
ROOM = 0.92
"""Share of a card that a plan may fill."""

GATHERED = "base, gathered for sampling"
WHILE_SAMPLING = ("vLLM", "generation cache", GATHERED)
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

    @property
    def block(self) -> int:
        """Parameters of a layer."""
        return (self.backbone - (self.vocabulary + 1) * self.hidden) // self.layers

    def gathered(self, head: bool) -> int:
        """What FSDP has in one piece at a time: a block, and the root (embeddings, norm, head)."""
        root = (self.vocabulary + 1) * self.hidden
        return self.block + root + (self.head if head else 0)


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


def planned_card(config: Config) -> int | None:
    """Memory of the GPU that the plan is for; None: there is none, and none is named."""
    return int(config.run.memory * 2**30) or card_bytes()


def card_bytes() -> int | None:
    """Memory of this machine's GPU, if it has one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Plan:
    """What stages take on each rank, and whether a card has room for it."""

    columns: dict[str, dict[str, int]]  # stage -> component -> bytes
    most: dict[str, int]  # stage -> what lives at the same time at most
    card: int | None

    @property
    def needed(self) -> int:
        return max(self.most.values())

    @property
    def fits(self) -> bool | None:
        """None where no card is known. With room for CUDA, libraries and the allocator's cuts."""
        return None if self.card is None else self.needed <= ROOM * self.card


def plan(
    config: Config,
    stages: Sequence[str],
    policy: Shape,
    reward: Shape | None = None,
    ranks: int | None = None,
    card: int | None = None,
) -> Plan:
    """Of training stages. `reward`: where it is another model's; `ranks` and `card`: where they are
    not those that the configuration names, or this machine's."""
    ranks = ranks or planned_ranks(config)
    card = card or planned_card(config)
    columns = {s: estimate(config, s, policy, reward or policy, ranks, card) for s in stages}
    return Plan(columns, {s: at_once(config, parts) for s, parts in columns.items()}, card)


def estimate(
    config: Config, stage: str, policy: Shape, reward: Shape, ranks: int, card: int | None = None
) -> dict[str, int]:
    """Bytes on one rank by component. Weights, gradients and optimiser state are spread over the
    ranks; adapters, activations and the generation cache are not. `card`: a GPU's memory, where it
    is known; what waits in the CPU's memory is then not counted.

    An estimate: the allocator's rounding and the libraries' own memory come on top.
    """
    shares = config.lora.active and (stage != "sft" or config.lora.sft)
    parts = _on_one_base if shares else _of_their_own
    out = parts(config, stage, policy, reward, ranks, card)
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
    shape = reward if stage in ("rm", "metarm") else policy
    out["activations"] = _activations(config, stage, shape, tokens)
    if stage == "ppo":
        resident = sum(out.get(name, 0) for name in out if name not in WHILE_TRAINING)
        out |= _sampling(config, policy, ranks, card, resident)
    return {name: int(value) for name, value in out.items()}


def _of_their_own(
    config: Config, stage: str, policy: Shape, reward: Shape, ranks: int, card: int | None
) -> dict[str, float]:
    """Each model has weights of its own, and what is trained of it is all of it."""
    judges, model = stage in ("rm", "metarm"), config.model
    shape = reward if judges else policy
    trained = shape.backbone if judges else shape.parameters
    compute, gpu = _compute(config, stage), card is not None
    master, moments = _trained_bytes(config)
    away = gpu and config.trainer.optimizer == "offload"
    out: dict[str, float] = {
        "weights": 0 if away else master * trained / ranks,
        "gradients": 0 if away else master * trained / ranks,
        "optimiser": 0 if away else moments * trained / ranks,
    }
    if stage == "metarm":  # of a round's reward model; its PPO is as stage ppo
        out["theta, kept aside"] = master * trained / ranks
    if ranks > 1 or gpu or compute < FP32:  # as parallel.shards
        out["gathered for compute"] = compute * shape.gathered(head=not judges)
    if stage != "ppo":
        return out
    has_reward = config.reward.model_weight != 0
    # reading a model's weights from the CPU's memory takes a block at a time, as gathering does
    if not model.offload_reference:
        out["reference"] = compute * policy.parameters / ranks
    if not model.offload_reward:
        out["reward model"] = compute * reward.backbone / ranks if has_reward else 0
    if config.ppo.has_critic or config.groups.has_head:
        body = reward if model.critic == "reward" and has_reward else policy
        if away or (gpu and model.offload_critic):
            out["critic"] = 0
        else:
            # Its gradients do not live at the same time as the policy's: the larger ones count.
            out["critic"] = (master + moments) * body.backbone / ranks
            if not away:
                out["gradients"] = master * max(policy.parameters, body.backbone) / ranks
    return out


def _on_one_base(
    config: Config, stage: str, policy: Shape, reward: Shape, ranks: int, card: int | None
) -> dict[str, float]:
    """One frozen base; of the rest there are adapters, whole on every rank."""
    lora, compute = config.lora, _compute(config, stage)
    judges = stage in ("rm", "metarm")
    base = policy.backbone if judges else policy.parameters
    if lora.quantize == "nf4":
        inner = policy.layers * policy.block
        whole = NF4 * inner + compute * (base - inner)
        out: dict[str, float] = {"base, 4 bits": whole}
    else:
        out = {"base": compute * base / ranks}
        if ranks > 1:
            out["gathered for compute"] = compute * policy.gathered(head=not judges)
    ours = adapter_parameters(config, policy, lora.rank, head=not judges)
    trained = [ours]
    if stage == "ppo":
        if config.ppo.has_critic or config.groups.has_head:
            rank = lora.critic_rank or lora.rank
            trained.append(adapter_parameters(config, policy, rank, head=False))
        if config.reward.model_weight and not config.model.reward:
            body = adapter_parameters(config, policy, lora.rank, head=False)
            out["reward adapter"] = FP32 * body
        elif config.reward.model_weight and not config.model.offload_reward:
            out["reward model"] = compute * reward.backbone / ranks
        if config.model.reference and not config.model.offload_reference:
            out["reference"] = compute * policy.parameters / ranks
    out["adapters"] = FP32 * sum(trained)
    out["optimiser"] = ADAM * sum(trained)
    out["gradients"] = FP32 * max(trained)
    if stage == "metarm":
        out["theta, kept aside"] = FP32 * ours
    return out


def adapter_parameters(config: Config, shape: Shape, rank: int, head: bool) -> int:
    """Of one adapter; `head`: the policy's, which may reach head and embeddings."""
    hidden, inner = shape.hidden, shape.intermediate
    sides = {
        "q_proj": hidden + shape.query,
        "k_proj": hidden + shape.key_value,
        "v_proj": hidden + shape.key_value,
        "o_proj": shape.query + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    names = config.lora.names
    layer = sum(side for name, side in sides.items() if name in names or "all-linear" in names)
    ends = sum(name in ("lm_head", "embed_tokens") for name in names) if head else 0
    return rank * (shape.layers * layer + ends * (hidden + shape.vocabulary))


def _trained_bytes(config: Config) -> tuple[float, float]:
    """Of a trained weight: its master, as of its gradient; its two moments."""
    master = 2 if config.trainer.masters == "bfloat16" else FP32
    return master, ADAM_8BIT if config.trainer.optimizer == "adamw8bit" else ADAM


def at_once(config: Config, parts: dict[str, int]) -> int:
    """The most of it that lives at the same time."""
    sampling = sum(parts.get(name, 0) for name in WHILE_SAMPLING)
    training = sum(parts.get(name, 0) for name in WHILE_TRAINING)
    if "vLLM" in parts and not config.rollout.sleep:
        return sum(parts.values())
    return sum(parts.values()) - min(sampling, training)


def _sampling(
    config: Config, policy: Shape, ranks: int, card: int | None, resident: float
) -> dict[str, float]:
    """Of the engine: the weights in one piece, and a cache. `resident`: what the trainer keeps on
    the card meanwhile."""
    rollout, compute = config.rollout, _compute(config, "ppo")
    if rollout.engine == "hf":
        cache: dict[str, float] = {"generation cache": _cache(config, policy, rollout.batch, DRAWN)}
        if config.lora.active:
            gathers = ranks > 1 and config.lora.quantize == "none"
            return cache | ({GATHERED: compute * policy.parameters} if gathers else {})
        sharded = ranks > 1 or card is not None or compute < FP32
        return cache | ({"policy for sampling": compute * policy.parameters} if sharded else {})
    if card is not None:
        share = rollout.gpu_memory
        # auto: what is left, as rollout/room.gpu_share takes it
        taken = ROOM * card - resident if isinstance(share, str) else share * card
        least = compute * policy.parameters / rollout.tensor_parallel + VLLM_LEAST
        return {"vLLM": max(taken, least + _cache(config, policy, 1))}
    together = rollout.tensor_parallel
    rows = min(rollout.max_num_seqs, -(-config.ppo.sequences_per_step * together // ranks))
    return {
        "policy for sampling": compute * policy.parameters / together,
        "generation cache": _cache(config, policy, rows) / together,
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


def _cache(config: Config, shape: Shape, rows: int, logit: int = LOGIT) -> int:
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    cache = 2 * shape.layers * shape.key_value * _compute(config, "ppo") * tokens
    return rows * (cache + logit * shape.vocabulary)  # and one step's logits
