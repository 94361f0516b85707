"""The models of each stage, as the configuration wants them trained: all weights, or adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.models import loading, shared
from trainer.models.backbone import Use, base_of, kept
from trainer.models.policy import Policy
from trainer.models.reward import RewardModel
from trainer.models.saving import save_merged
from trainer.models.shared import Models
from trainer.models.sources import policy_source, reference_source
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.optim import Optimizer
from trainer.runs.state import TrainState


def sft_policy(config: Config, run: RunFolder) -> Policy:
    source = config.model.policy
    if config.lora.active and config.lora.sft:
        return shared.policy(source, config, run)
    return loading.load_policy(source, config, trained=True)


def save_base(
    policy: Policy, path: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """What later stages start from: a whole model, whatever was trained of it."""
    if isinstance(policy.through, Use):
        save_merged(policy.model, policy.through.adapter, path, tokenizer, dtype)
    else:
        policy.save(path, tokenizer, dtype)


def trained_reward_model(
    source: str,
    config: Config,
    head: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardModel:
    if config.lora.active:
        return shared.reward_model(source, config, head, tokenizer)
    return loading.load_reward_model(source, config, head, tokenizer, trained=True)


def ppo_models(config: Config, run: RunFolder, num_groups: int) -> Models:
    if config.lora.active:
        return shared.ppo_models(config, run, num_groups)
    policy = loading.load_policy(policy_source(config, run), config, trained=True)
    anchor, offload = reference_source(config, run), config.model.offload_reference
    reference = loading.load_policy(anchor, config, offload=offload)
    critic = loading.make_critic(config, run, policy, num_groups)
    return Models(policy, reference, critic, *loading.load_scoring_model(config, run))


def state(name: str, model: nn.Module, optimizer: Optimizer, guard: Guard) -> TrainState:
    """Of a stage that trains one model."""
    own = kept(**{name: model})
    return TrainState({name: model}, {name: optimizer}, {"guard": guard}, base_of(model), own)
