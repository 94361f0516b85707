"""The supervised stages, and the rounds of the reward model after PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import check_training, want


@dataclass(frozen=True, kw_only=True)
class Sft:
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 64
    """Demonstrations a step."""
    lr: float = 1e-5
    """Learning rate, after warm-up; it falls to a tenth along a cosine."""
    warmup: int = 20
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        check_training("sft", self)
        want(self.batch > 0, "sft.batch", self.batch, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Rm:
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 64
    """Pairs a step."""
    lr: float = 1e-5
    """Learning rate, after warm-up; it falls to a tenth along a cosine."""
    warmup: int = 20
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    head: Literal["last", "pooled"] = "last"
    """Reads the score from the last token, or from the mean over the answer's tokens."""
    margin: bool = False
    """Use the data's margins: -log sigma(chosen - rejected - margin)."""
    label_smoothing: float = 0.0
    """Share of the labels that are taken to be wrong."""
    centring: float = 0.0
    """Weight of mean((chosen + rejected)^2), which keeps scores around 0."""
    rating: float = 0.0
    """Weight of the squared error against absolute ratings, where the data has them."""
    pairs: int = 16384
    """Toy world: prompts for which pairs are sampled from the SFT model."""
    best_of: int = 4
    """Toy world: answers a prompt, of which the best and the worst make the pair."""
    validation: float = 0.05
    """Share of the pairs held out, to measure accuracy."""

    def __post_init__(self) -> None:
        check_training("rm", self)
        want(self.batch > 0, "rm.batch", self.batch, "1 or more")
        want(0 <= self.label_smoothing < 1, "rm.label_smoothing", self.label_smoothing, "[0, 1)")
        want(self.centring >= 0, "rm.centring", self.centring, "0 or more")
        want(self.rating >= 0, "rm.rating", self.rating, "0 or more")
        want(self.pairs > 0, "rm.pairs", self.pairs, "1 or more")
        want(self.best_of >= 2, "rm.best_of", self.best_of, "2 or more")
        want(0 <= self.validation < 1, "rm.validation", self.validation, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MetaRm:
    """Rounds after PPO in which the reward model follows the policy's shift, without new labels:
    answers of today's policy, reward model over the original pairs, PPO with the new one."""

    rounds: int = 0
    """How many; 0: none."""
    variant: Literal["none", "literal", "normalised", "additive", "supported"] = "normalised"
    """How answers without labels enter; none: as many plain steps on the pairs, the control."""
    step: float = 0.1
    """eta: the length of the detour, in units of the weights; literal: a factor of the gradient of
    J; additive: the weight of J."""
    prompts: Literal["train", "ood"] = "train"
    """Where the answered prompts come from: data.prompts, or data.ood_prompts (every other one, the
    rest is for measuring)."""
    meta_prompts: int = 512
    """Prompts that the policy answers for a round's training."""
    samples: int = 5
    """k, answers to each of them."""
    meta_batch: int = 16
    """Prompts of a step, beside rm.batch pairs."""
    test_prompts: int = 256
    """Prompts whose answers measure a round, of data.eval_prompts if it is there."""
    steps: int = 100
    """Steps of the reward model in a round."""
    lr: float = 5e-6
    """Its learning rate, after rm.warmup; it falls to a tenth along a cosine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of its compute. An ascent of 5e-6 is below the resolution of bfloat16 weights, so
    there it would all but vanish."""
    ppo_steps: int = 0
    """PPO iterations of a round; 0: ppo.steps."""
    policy: Literal["previous", "sft"] = "previous"
    """Where a round's policy starts; the KL penalty always holds on to the SFT model."""

    def __post_init__(self) -> None:
        for key in ("rounds", "step", "ppo_steps"):
            want(getattr(self, key) >= 0, f"metarm.{key}", getattr(self, key), "0 or more")
        for key in ("meta_prompts", "meta_batch", "test_prompts", "steps"):
            want(getattr(self, key) > 0, f"metarm.{key}", getattr(self, key), "1 or more")
        want(self.samples >= 2, "metarm.samples", self.samples, "2 or more: they are compared")
        want(self.lr > 0, "metarm.lr", self.lr, "more than 0")
