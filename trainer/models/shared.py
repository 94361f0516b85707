"""Models that share one frozen base: each is an adapter on it, and the reference is the base.

policy(...)        alone on its base, for stage sft
reward_model(...)  alone on its base, for stage rm and the rounds after it
ppo_models(...)    policy, critic and reward model of PPO on one
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer import parallel
from trainer.config import Config, ConfigError
from trainer.models import adapters, loading
from trainer.models.backbone import (
    Backbone,
    Use,
    adapter_of,
    import_peft,
    settings_for,
)
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.models.quantized import options_for
from trainer.models.reward import RewardModel
from trainer.models.saving import quietly, save_pretrained
from trainer.models.sources import policy_source, reference_source, reward_source
from trainer.runs.folder import RunFolder
from trainer.worlds import registry

CAUSAL, READING = "CAUSAL_LM", "SEQ_CLS"
"""PEFT's names of what a model with an adapter does."""


class Models(NamedTuple):
    """Of PPO."""

    policy: Policy
    reference: Policy
    critic: Critic | None
    reward: RewardModel | None
    reward_tokenizer: PreTrainedTokenizerBase | None


def policy(source: str, config: Config, run: RunFolder) -> Policy:
    backbone = _causal_base(source, config, run)
    _add(backbone, "policy", config, source)
    return Policy(backbone.model, Use(_placed(backbone, config), "policy")).eval()


def reward_model(
    source: str,
    config: Config,
    head: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardModel:
    """From a causal language model's folder, with a new score layer, or from an adapter's."""
    start = source if adapters.is_adapter(source) else None
    base = adapters.base_of(start) if start else source
    torch.manual_seed(config.run.seed)  # the new layer's weights
    dtype = parallel.compute_dtype(config)
    options = options_for(config)
    model = loading.load(AutoModelForSequenceClassification, base, config, dtype, **options)
    if tokenizer is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if start:
        said = AutoConfig.from_pretrained(start)
        model.config.reward_head = said.reward_head
        model.config.get_text_config().pad_token_id = said.get_text_config().pad_token_id
    backbone = Backbone(model, adapters.base(base))
    model.score = _new_score(model, dtype)
    loading.set_up(backbone, config)
    _add(backbone, "reward", config, start, part=model.base_model, task=READING)
    if start:
        _read(model.score, adapters.read(start), "score.")
    return RewardModel(model, head, Use(_placed(backbone, config), "reward")).eval()


def ppo_models(config: Config, run: RunFolder, num_groups: int) -> Models:
    source, anchor = policy_source(config, run), reference_source(config, run)
    backbone = _causal_base(source, config, run)
    model, base = backbone.model, backbone.base
    _add(backbone, "policy", config, source)
    judge = reward_source(config, run) if config.reward.model_weight else None
    ours = judge if judge and _stands_on(judge, base) else None
    if ours:
        _attach(backbone, "reward", ours)
    has_critic = config.ppo.has_critic or config.groups.has_head
    if has_critic:
        _add_critic(backbone, config, ours)
    _placed(backbone, config)
    reference = Policy(model, Use(backbone, None))
    if anchor not in (source, base.source):
        reference = loading.load_policy(anchor, config, offload=config.model.offload_reference)
    reward = _reader(backbone, ours) if ours else None
    if judge and not ours:
        reward = loading.load_reward_model(judge, config, offload=config.model.offload_reward)
    critic = None
    if has_critic:
        torch.manual_seed(config.run.seed)  # the new heads' weights
        hidden_size = model.config.get_text_config().hidden_size
        critic = Critic(
            model.base_model, hidden_size, num_groups, config.groups.on, Use(backbone, "critic")
        )
        for part in critic.heads:
            part.to(parallel.device())
        critic.eval()
    theirs = loading.load_tokenizer(judge, config) if judge else None
    return Models(Policy(model, Use(backbone, "policy")).eval(), reference, critic, reward, theirs)


# --- the base -------------------------------------------------------------------------------------


def _causal_base(source: str, config: Config, run: RunFolder) -> Backbone:
    """Of a policy that starts at `source`, a model or an adapter on one."""
    base = adapters.base_of(source) if adapters.is_adapter(source) else source
    if registry.is_world(base):
        base = _world_base(base, config, run)
    model = loading.causal(base, config, trained=False, **options_for(config))
    backbone = Backbone(model, adapters.base(base))
    loading.set_up(backbone, config)
    return backbone


def _world_base(name: str, config: Config, run: RunFolder) -> str:
    """A world makes its model from a seed; an adapter wants a folder to stand on."""
    folder = run.model("base")
    if not parallel.all_true(folder.is_dir()):
        made = registry.base(name, config)
        dtype = parallel.compute_dtype(config)
        save_pretrained(made.model(config.run.seed), folder, made.tokenizer(), dtype)
    return str(folder)


def _placed(backbone: Backbone, config: Config) -> Backbone:
    """On this machine, all adapters being there."""
    beside = [p for n, p in backbone.named_parameters() if "lora_" in n or p.requires_grad]
    if config.lora.quantize == "none":
        parallel.place(backbone, config, beside=beside)
    else:
        backbone.to(parallel.device())  # 4 bits are not for shards; every rank has read its own
        parallel.from_main(beside)
    return backbone.eval()


# --- adapters -------------------------------------------------------------------------------------


def _add(
    backbone: Backbone,
    name: str,
    config: Config,
    start: str | None,
    part: PreTrainedModel | None = None,
    task: str = CAUSAL,
) -> None:
    """A new adapter with the configuration's settings, or the one of folder `start`, trained on."""
    part = part or backbone.model
    torch.manual_seed(config.run.seed)
    settings = settings_for(config.lora, config.lora.rank, part, task)
    if start is None or not adapters.is_adapter(start):
        return backbone.add(name, settings, part)
    said = adapters.settings_of(start)
    same = (said["r"], said["lora_alpha"], sorted(said["target_modules"]))
    if same != (settings.r, settings.lora_alpha, sorted(settings.target_modules)):
        raise ConfigError(
            "is an adapter of another rank, alpha or targets than section lora: want those, or "
            "merge it into its base first (gi export --merge)",
            where=start,
        )
    backbone.add(name, settings, part)
    _fill(backbone, name, start)


def _attach(backbone: Backbone, name: str, source: str) -> None:
    """The adapter of a folder as it is, frozen, on the body."""
    settings = import_peft().LoraConfig.from_pretrained(source)
    settings.lora_dropout, settings.modules_to_save = 0.0, None
    backbone.add(name, settings, backbone.model.base_model)
    _fill(backbone, name, source)
    for p in adapter_of(backbone.model, name).values():
        p.requires_grad_(False)


def _add_critic(backbone: Backbone, config: Config, reward: str | None) -> None:
    """As new, or from the adapter that the configuration names."""
    named, lora = config.model.critic, config.lora
    torch.manual_seed(config.run.seed)
    body = backbone.model.base_model
    settings = settings_for(lora, lora.critic_rank or lora.rank, body, READING)
    backbone.add("critic", settings, body)
    if named == "policy":
        return
    start = reward if named == "reward" else named
    if start is None or not _stands_on(start, backbone.base):
        raise ConfigError(
            f"is {named!r}; want policy where lora.rank is more than 0, or an "
            f"adapter on the policy's base ({backbone.base.source})",
            "model.critic",
        )
    _widen(backbone, start, settings)


def _stands_on(source: str, base: adapters.Base) -> bool:
    """Whether it is an adapter on this base."""
    if not adapters.is_adapter(source):
        return False
    theirs = adapters.base_of(source)
    if theirs != base.source and adapters.base(theirs).fingerprint != base.fingerprint:
        return False
    adapters.refuse_other_base(source, base)
    return True


def _fill(backbone: Backbone, name: str, source: str) -> None:
    adapters.refuse_other_base(source, backbone.base)
    weights = adapters.read(source)
    for of, p in adapter_of(backbone.model, name).items():
        _copy(p, weights[of.replace(f".{name}", "")])


def _widen(backbone: Backbone, source: str, settings: Any) -> None:
    """The critic's adapter from one whose rank may be lower: it adds the very same."""
    weights, said = adapters.read(source), adapters.settings_of(source)
    rank, scale = said["r"], said["lora_alpha"] / said["r"] / (settings.lora_alpha / settings.r)
    if rank > settings.r:
        raise ConfigError(
            f"is {settings.r}; want at least {rank}, the rank of {source}", "lora.critic_rank"
        )
    for name, p in adapter_of(backbone.model, "critic").items():
        theirs = weights.get(name.replace(".critic", ""))
        if theirs is None:
            raise ConfigError(
                f"want those of {source}, from which the critic starts", "lora.targets"
            )
        down = "lora_A" in name or "lora_embedding_A" in name
        wide = p.detach().clone()
        if down:
            wide[:rank] = theirs
        else:
            wide[:, :rank] = theirs * scale
        _copy(p, wide)


def _copy(p: Tensor, weight: Tensor) -> None:
    if not p.is_meta:  # rank 0 gives the others theirs
        p.data.copy_(weight)


# --- the reward model -----------------------------------------------------------------------------


def _new_score(model: PreTrainedModel, dtype: torch.dtype) -> nn.Linear:
    """In float32, as drawn in float32."""
    score = nn.Linear(model.score.in_features, 1, bias=False)
    text = model.config.get_text_config()
    nn.init.normal_(score.weight, std=getattr(text, "initializer_range", 0.02))
    return score


def _reader(backbone: Backbone, source: str) -> RewardModel:
    """The adapter "reward" with the score layer of its folder, around the body that it shares."""
    settings = AutoConfig.from_pretrained(source)
    with torch.device("meta"), quietly():
        model = AutoModelForSequenceClassification.from_config(settings)
    setattr(model, model.base_model_prefix, backbone.model.base_model)
    model.score = nn.Linear(model.score.in_features, 1, bias=False).to(parallel.device())
    _read(model.score, adapters.read(source), "score.")
    model.score.requires_grad_(False)
    return RewardModel(model, None, Use(backbone, "reward")).eval()


def _read(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    for name, p in module.named_parameters():
        _copy(p, weights[prefix + name])
