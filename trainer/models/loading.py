"""Models from a folder, a name or a world, ready to use: frozen or trained, placed, packed.

Rank 0 reads; the other ranks get their part from it.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer import parallel
from trainer.config import Config, ConfigError
from trainer.data.encode import ready
from trainer.models import adapters, quantized
from trainer.models.backbone import import_peft
from trainer.models.critic import Critic
from trainer.models.packing import caps_attention, kernel, use_packed, why_not_packed
from trainer.models.policy import Policy
from trainer.models.reward import RewardModel
from trainer.models.saving import quietly
from trainer.models.sources import policy_source, reward_source
from trainer.runs.folder import RunFolder
from trainer.worlds import registry

M = TypeVar("M", bound=nn.Module)
Auto = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]


def gather(policy: Policy, dtype: torch.dtype, into: Policy | None) -> Policy:
    """A sharded policy as a whole one on this rank, for sampling; `into` is used again."""
    if into is None:
        with torch.device("meta"), quietly():
            model = type(policy.model)(policy.model.config)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        model.to_empty(device=parallel.device())
        model.tie_weights()
        model.generation_config = policy.model.generation_config
        into = Policy(model).requires_grad_(False).eval()
    for ours, theirs in ((into.parameters, policy.parameters), (into.buffers, policy.buffers)):
        for mine, sharded in zip(ours(), theirs(), strict=True):
            mine.data.copy_(parallel.whole(sharded.detach()))
    return into


def load_tokenizer(source: str, config: Config) -> PreTrainedTokenizerBase:
    if registry.is_world(source):
        return registry.base(source, config).tokenizer()
    with quietly():
        return ready(
            AutoTokenizer.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)
        )


def load_policy(
    source: str, config: Config, trained: bool = False, offload: bool = False
) -> Policy:
    """`offload`: weights wait in the CPU's memory and visit the GPU block by block."""
    return prepare(Policy(causal(source, config, trained)), config, trained, offload)


def causal(source: str, config: Config, trained: bool, **options: Any) -> PreTrainedModel:
    """Masters in float32; what is not trained in the dtype of compute, from the start."""
    dtype = torch.float32 if trained else parallel.compute_dtype(config)
    if registry.is_world(source):
        return registry.base(source, config).model(config.run.seed).to(dtype)
    return load(AutoModelForCausalLM, source, config, dtype, **options)


def load_reward_model(
    source: str,
    config: Config,
    head: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trained: bool = False,
    offload: bool = False,
) -> RewardModel:
    """A reward model; or, from a causal language model's folder, one with a new score layer, which
    takes its pad token from the tokenizer."""
    return prepare(reward_model(source, config, head, tokenizer), config, trained, offload)


def reward_model(
    source: str,
    config: Config,
    head: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardModel:
    torch.manual_seed(config.run.seed)  # the new layer's weights
    if registry.is_world(source):
        raise ConfigError(
            f"{source}: a reward model starts from the model of stage sft", "model.policy"
        )
    model = load(AutoModelForSequenceClassification, source, config)
    if tokenizer is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return RewardModel(model, head)


def load_scoring_model(
    config: Config, run: RunFolder
) -> tuple[RewardModel | None, PreTrainedTokenizerBase | None]:
    """The frozen reward model and its own tokenizer; none where functions alone give the reward."""
    if config.reward.model_weight == 0:
        return None, None
    source = reward_source(config, run)
    offload = config.model.offload_reward
    return load_reward_model(source, config, offload=offload), load_tokenizer(source, config)


def make_critic(config: Config, run: RunFolder, policy: Policy, num_groups: int) -> Critic | None:
    """From the reward model's or the policy's backbone, or from a path. None where neither values
    nor a group head are asked for."""
    if not (config.ppo.has_critic or config.groups.has_head):
        return None
    source = config.model.critic
    if source == "reward" and config.reward.model_weight:
        body = reward_model(reward_source(config, run), config).model.base_model
        vocabulary = policy.model.get_input_embeddings().num_embeddings
        if body.get_input_embeddings().num_embeddings < vocabulary:
            raise ConfigError(
                "reward: the reward model has another vocabulary than the policy; want policy",
                "model.critic",
            )
    else:
        named = source not in ("reward", "policy")
        start = source if named else policy_source(config, run)
        body = causal(start, config, trained=True).base_model
    torch.manual_seed(config.run.seed)  # the new heads' weights
    hidden_size = body.config.get_text_config().hidden_size
    critic = Critic(body, hidden_size, num_groups, config.groups.on)
    return prepare(critic, config, trained=True, offload=config.model.offload_critic)


def prepare(module: M, config: Config, trained: bool, offload: bool = False) -> M:
    """The one place where a finished model meets the machine. Models come in eval mode; only an
    update switches to train mode, which gradient checkpointing asks for."""
    set_up(module, config)
    if not trained:
        parallel.in_compute_dtype(module.requires_grad_(False), config)
    elif config.trainer.masters == "bfloat16":
        parallel.in_compute_dtype(module, config)  # but for the heads
    offload = offload or (trained and config.trainer.optimizer == "offload")
    return parallel.place(module, config, offload).eval()


def offload_activations(body: nn.Module) -> None:
    """What the body keeps for the backward pass waits in the CPU's memory: with checkpointing the
    inputs of its blocks."""
    forward = body.forward

    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.autograd.graph.save_on_cpu(pin_memory=parallel.device().type == "cuda"):
            return forward(*args, **kwargs)

    body.forward = offloading


def set_up(module: nn.Module, config: Config) -> None:
    """Dropout is off: it would make the log-probabilities of training and sampling those of two
    different policies. Sequences are packed, activations recomputed, as the settings say."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0  # type: ignore[assignment]  # not Tensor | Module
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    if packs(model, config):
        use_packed(model)
    if config.model.offload_activations:
        offload_activations(model.base_model)
    if config.model.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
        (enable or model.gradient_checkpointing_enable)()


def check_attention(config: Config) -> None:
    """Before anything is written: a name that transformers knows."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, known = config.model.attention, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # a kernel of the hub is named by its repository
    if name not in known and "/" not in name:
        raise ConfigError(f"is {name!r}; want one of {', '.join(known)}", "model.attention")


def packs(model: PreTrainedModel, config: Config) -> bool:
    """Whether its sequences lie side by side: where it can, unless it is told otherwise."""
    if config.model.packing == "on" and (why_not := why_not_packed(model)):
        raise ConfigError(f"on: {_class(model)} {why_not}; want auto or off", "model.packing")
    return config.model.packing != "off" and not why_not_packed(model)


def implementation(settings: PreTrainedConfig, config: Config) -> str:
    """transformers' attention where nothing is packed: model.attention, but eager in place of sdpa
    for a model that sdpa would compute wrongly."""
    asked = config.model.attention
    return "eager" if asked == "sdpa" and caps_attention(settings) else asked


def describe_attention(config: Config) -> str:
    """Of each model that the configuration names; in one phrase where it is the same for all."""
    named = {
        config.model.policy: AutoModelForCausalLM,
        config.model.reference: AutoModelForCausalLM,
        config.model.reward: AutoModelForSequenceClassification,
    }
    phrases: dict[str, list[str]] = {}
    for source, auto in named.items():
        if source:
            phrases.setdefault(_described(source, auto, config), []).append(source)
    if len(phrases) == 1:
        return next(iter(phrases))
    return "; ".join(f"{', '.join(sources)}: {text}" for text, sources in phrases.items())


def _described(source: str, auto: Auto, config: Config) -> str:
    if registry.is_world(source):
        settings = registry.base(source, config).model_config()
    else:
        settings = _settings(source, config)
    how = implementation(settings, config)
    with torch.device("meta"), quietly():
        code = config.model.trust_remote_code
        model = auto.from_config(settings, attn_implementation=how, trust_remote_code=code)
    if packs(model, config):
        which = kernel(parallel.device().type, parallel.compute_dtype(config))
        return f"packed sequences, attention {which}"
    why_not = (
        f" ({_class(model)} {why_not_packed(model)})" if config.model.packing == "auto" else ""
    )
    return f"padded sequences, attention {how}{why_not}"


def _class(model: PreTrainedModel) -> str:
    return type(model).__name__


def _settings(source: str, config: Config, **options: Any) -> PreTrainedConfig:
    code = config.model.trust_remote_code
    if adapters.is_adapter(source) and not Path(source, "config.json").is_file():
        source = adapters.base_of(source)  # PEFT's own folders have none
    return AutoConfig.from_pretrained(source, trust_remote_code=code, **options)


def load(
    auto: Auto, source: str, config: Config, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """Rank 0 reads the weights; the others build a model without storage and get theirs from it.
    An adapter comes merged into its base."""
    labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    with quietly():
        settings = _settings(source, config, **labels)
        common = {
            "attn_implementation": implementation(settings, config),
            "trust_remote_code": config.model.trust_remote_code,
        }
        if not parallel.is_main() and not options:
            with torch.device("meta"):
                model = auto.from_config(settings, dtype=dtype, **common)
            with contextlib.suppress(OSError):  # it says where answers end
                model.generation_config = GenerationConfig.from_pretrained(source)
            return model
        own = adapters.base_of(source) if adapters.is_adapter(source) else source
        model = auto.from_pretrained(own, dtype=dtype, **common, **labels, **options)
        if options:
            quantized.settle(model)
        return model if own == source else _merged(model, source, own, settings)


def _merged(
    model: PreTrainedModel, source: str, own: str, settings: PreTrainedConfig
) -> PreTrainedModel:
    """A base with the adapter of a folder in it."""
    adapters.refuse_other_base(source, adapters.Base(own, adapters.fingerprint(own)))
    if adapters.untie(model, source):
        settings.get_text_config().tie_word_embeddings = settings.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names in transformers that PEFT still uses
        merged = import_peft().PeftModel.from_pretrained(model, source).merge_and_unload()
    merged.config = settings
    return merged
