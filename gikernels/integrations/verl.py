"""verl (tested with 0.9.1): advantage estimators, a policy loss, and its fused head.

    VERL_USE_EXTERNAL_MODULES=gikernels.integrations.verl_plugin python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=group_invariant \
        +algorithm.group_invariance.num_groups=2 ...

verl imports that module in every process that it starts, on every node; docs/how-to/verl.md has
the whole recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import verl.utils.kernel.linear_cross_entropy as verl_head
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

import gikernels
from gikernels.integrations.invariance import GroupInvariance
from gikernels.integrations.losses import sequence_mean_weights, weighted_ppo_loss
from gikernels.integrations.replace import rebind, replaced

# --- advantage estimators -----------------------------------------------------------------------


def prompt_groups(index: Sequence[Any], device: torch.device) -> tuple[Tensor, int]:
    """verl names the prompt of each sample by a uid: (S) numbers 0 .. P-1, and P."""
    numbers: dict[Any, int] = {}
    ids = [numbers.setdefault(uid, len(numbers)) for uid in index]
    return torch.tensor(ids, device=device), len(numbers)


def group_norm(
    token_level_rewards: Tensor,  # (S, T)
    response_mask: Tensor,  # (S, T)
    index: Sequence[Any],  # (S) uids of the prompts
    config: Any = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """`group_advantages` over each prompt's samples: what verl calls grpo."""
    scores = (token_level_rewards * response_mask).sum(1)
    ids, count = prompt_groups(index, scores.device)
    by_std = config is None or config.get("norm_adv_by_std_in_grpo", True)
    scale = "std" if by_std else "none"
    advantages = gikernels.group_advantages(scores, ids, count, scale=scale)
    advantages = advantages.unsqueeze(1) * response_mask
    return advantages, advantages


def group_invariant(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    config: Any = None,
    reward_baselines: Tensor | None = None,  # (S), a reference answer's reward, where verl has it
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """`group_norm` times the weight of the sequence's inferred group.

    Settings are those of `GroupInvariance`, under `algorithm.group_invariance`.
    """
    advantages, _ = group_norm(token_level_rewards, response_mask, index, config)
    settings = {} if config is None else dict(config.get("group_invariance", None) or {})
    if "clamp" in settings:
        settings["clamp"] = tuple(settings["clamp"])  # a list in YAML
    scores = (token_level_rewards * response_mask).sum(1)
    if reward_baselines is not None:
        scores = scores - reward_baselines
    ids, _ = prompt_groups(index, scores.device)
    weights = GroupInvariance(**settings).infer(scores, ids).weights
    advantages = advantages * weights.to(advantages).unsqueeze(1)
    return advantages, advantages


# --- the policy loss ----------------------------------------------------------------------------


def policy_loss(
    old_log_prob: Tensor,  # (S, T)
    log_prob: Tensor,  # (S, T)
    advantages: Tensor,  # (S, T)
    response_mask: Tensor,  # (S, T)
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # (S, T)
) -> tuple[Tensor, dict[str, float]]:
    """`gikernels.ppo_loss` with verl's clips, aggregation modes and global denominators."""
    mask = response_mask.bool()
    batch = config.global_batch_info
    sequences = batch.get("global_batch_size") or mask.any(1).sum().clamp(min=1)
    denom: Any = 1.0
    weights = rollout_is_weights
    if loss_agg_mode == "token-mean":
        denom = batch.get("batch_num_tokens") or mask.sum().clamp(min=1)
    elif loss_agg_mode == "seq-mean-token-sum":
        denom = sequences
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        denom = sequences * (batch.get("loss_scale_factor") or mask.shape[1])
    elif loss_agg_mode == "seq-mean-token-mean":
        denom = sequences
        per_token = sequence_mean_weights(mask)
        weights = per_token if weights is None else weights * per_token
    elif loss_agg_mode != "token-sum":
        raise ValueError(f"loss_agg_mode: got {loss_agg_mode!r}, which gikernels does not know")

    low, high = config.clip_ratio_low, config.clip_ratio_high
    out = weighted_ppo_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        denom=denom,
        token_weights=weights,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        dual_clip=config.get("clip_ratio_c", 3.0),
    )
    metrics = {
        "actor/pg_clipfrac": out.clipped.item(),
        "actor/ppo_kl": out.kl.item(),
        "actor/pg_clipfrac_lower": out.dual_clipped.item(),
    }
    return out.loss * batch.get("dp_size", 1), metrics


def register() -> None:
    """Into verl's registries: adv_estimator group_invariant, group_norm; loss_mode gikernels."""
    register_adv_est("group_norm")(group_norm)
    register_adv_est("group_invariant")(group_invariant)
    register_policy_loss("gikernels")(policy_loss)


# --- the fused head -----------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of this name through `linear_logprobs`: (log-probs, entropy), each (N). With
    a group weight is this rank's part of the vocabulary, and dhidden is summed, as by verl's."""
    if reduction != "none":
        raise ValueError(f"reduction: got {reduction!r}, want 'none', the one that verl asks for")
    stats = gikernels.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature,
        vocab_group=dist_process_group,
    )
    return stats.logprobs, stats.entropy


def install() -> None:
    """verl's fused head is ours from now on, where model.use_fused_kernels asks for one."""
    rebind("verl", [(verl_head.linear_cross_entropy, linear_cross_entropy)])


@contextmanager
def patched() -> Iterator[None]:
    """`install`, undone on the way out."""
    with replaced("verl", [(verl_head.linear_cross_entropy, linear_cross_entropy)]):
        yield
