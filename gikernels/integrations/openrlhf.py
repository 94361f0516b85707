"""OpenRLHF (its interface of 0.11.2): log-probabilities, entropy and the policy loss.

    with gikernels.integrations.openrlhf.patched():
        trainer = ...; trainer.fit()

Nothing of OpenRLHF is imported here: it needs flash-attn and DeepSpeed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

import gikernels
from gikernels.backends import checks
from gikernels.integrations.losses import sequence_mean_weights, weighted_ppo_loss
from gikernels.integrations.replace import replaced


def log_probs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
) -> Tensor:
    """log_softmax(logits / temperature) at the labels. Unlike OpenRLHF's, leaves logits alone."""
    return gikernels.logprobs(logits, labels, temperature).logprobs


def compute_entropy(logits: Tensor) -> Tensor:  # (..., V) -> (...)
    return gikernels.logprobs(logits, logits.new_zeros(logits.shape[:-1]).long()).entropy


class PolicyLoss(nn.Module):
    """OpenRLHF's class of this name for policy_loss_type "ppo" without rollout correction."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        **is_correction: object,  # has no effect while the level is "off"
    ) -> None:
        super().__init__()
        checks.one_of("policy_loss_type", policy_loss_type, ("ppo",))
        checks.one_of("is_correction_level", is_correction_level, ("off",))
        self.clip_eps_low = checks.number("clip_eps_low", clip_eps_low, at_least=0)
        self.clip_eps_high = checks.number("clip_eps_high", clip_eps_high, at_least=0)
        if dual_clip is not None:
            checks.number("dual_clip", dual_clip, above=1)
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss

    def forward(
        self,
        log_probs: Tensor,  # (S, T)
        old_log_probs: Tensor,  # (S, T)
        advantages: Tensor,  # (S, T)
        action_mask: Tensor,  # (S, T)
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """(loss, share of clipped tokens, approximate KL, None, None)."""
        mask = action_mask.bool()
        denom: float | Tensor
        if self.token_level_loss:
            known, denom, weights = batch_num_tokens, mask.sum().clamp(min=1), None
        else:
            known, denom = global_batch_size, mask.any(1).sum().clamp(min=1)
            weights = sequence_mean_weights(mask)
        if known is not None:  # the global total; DeepSpeed averages over ranks what we sum
            denom = known / dp_size
        out = weighted_ppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            denom=denom,
            token_weights=weights,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
        )
        return out.loss, out.clipped, out.kl, None, None


@contextmanager
def patched() -> Iterator[None]:
    """In force inside the block, in every loaded module of OpenRLHF; undone on the way out."""
    utils = importlib.import_module("openrlhf.models.utils")
    loss = importlib.import_module("openrlhf.models.loss")
    pairs = [
        (utils.log_probs_from_logits, log_probs_from_logits),
        (utils.compute_entropy, compute_entropy),
        (loss.PolicyLoss, PolicyLoss),
    ]
    with replaced("openrlhf", pairs):
        yield
