"""The supervised stages, and the rounds of the reward model after PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, key


@dataclass(frozen=True, kw_only=True)
class Sft(Section, at="sft"):
    steps: int = key(1000, "Optimiser steps.", low=0, basic=True)
    batch: int = key(64, "Demonstrations a step.", low=1, basic=True)
    lr: float = key(
        1e-5,
        "Learning rate, after warm-up; it falls to a tenth along a cosine.",
        above=0,
        basic=True,
    )
    warmup: int = key(20, "Steps over which the learning rate rises.", low=0)
    weight_decay: float = key(0.0, "AdamW's weight decay.", low=0)
    grad_clip: float = key(1.0, "Largest gradient norm.", above=0)


@dataclass(frozen=True, kw_only=True)
class Rm(Section, at="rm"):
    steps: int = key(1000, "Optimiser steps.", low=0, basic=True)
    batch: int = key(64, "Pairs a step.", low=1, basic=True)
    lr: float = key(
        1e-5,
        "Learning rate, after warm-up; it falls to a tenth along a cosine.",
        above=0,
        basic=True,
    )
    warmup: int = key(20, "Steps over which the learning rate rises.", low=0)
    weight_decay: float = key(0.0, "AdamW's weight decay.", low=0)
    grad_clip: float = key(1.0, "Largest gradient norm.", above=0)
    head: Literal["last", "pooled"] = key(
        "last", "Reads the score from the last token, or from the mean over the answer's tokens."
    )
    margin: bool = key(False, "Use the data's margins: -log sigma(chosen - rejected - margin).")
    label_smoothing: float = key(
        0.0, "Share of the labels that are taken to be wrong.", low=0, below=1
    )
    centring: float = key(
        0.0, "Weight of mean((chosen + rejected)^2), which keeps scores around 0.", low=0
    )
    rating: float = key(
        0.0, "Weight of the squared error against absolute ratings, where the data has them.", low=0
    )
    pairs: int = key(
        16384, "Toy world: prompts for which pairs are sampled from the SFT model.", low=1
    )
    best_of: int = key(
        4, "Toy world: answers a prompt, of which the best and the worst make the pair.", low=2
    )
    validation: float = key(
        0.05,
        "Share of the pairs held out, to measure accuracy.",
        low=0,
        below=1,
        want="a share in [0, 1)",
    )


@dataclass(frozen=True, kw_only=True)
class MetaRm(Section, at="metarm"):
    """Rounds after PPO in which the reward model follows the policy's shift, without new labels:
    answers of today's policy, reward model over the original pairs, PPO with the new one."""

    rounds: int = key(0, "How many; 0: none.", low=0, basic=True)
    variant: Literal["none", "literal", "normalised", "additive", "supported"] = key(
        "normalised",
        "How answers without labels enter; none: as many plain steps on the pairs, the control.",
    )
    step: float = key(
        0.1,
        "eta: the length of the detour, in units of the weights; literal: a factor of the "
        "gradient of J; additive: the weight of J.",
        low=0,
    )
    prompts: Literal["train", "ood"] = key(
        "train",
        "Where the answered prompts come from: data.prompts, or data.ood_prompts (every other "
        "one, the rest is for measuring).",
    )
    meta_prompts: int = key(512, "Prompts that the policy answers for a round's training.", low=1)
    samples: int = key(5, "k, answers to each of them.", low=2, want="2 or more: they are compared")
    meta_batch: int = key(16, "Prompts of a step, beside rm.batch pairs.", low=1)
    test_prompts: int = key(
        256, "Prompts whose answers measure a round, of data.eval_prompts if it is there.", low=1
    )
    steps: int = key(100, "Steps of the reward model in a round.", low=1)
    lr: float = key(
        5e-6, "Its learning rate, after rm.warmup; it falls to a tenth along a cosine.", above=0
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "Precision of its compute. An ascent of 5e-6 is below the resolution of bfloat16 "
        "weights, so there it would all but vanish.",
    )
    ppo_steps: int = key(0, "PPO iterations of a round; 0: ppo.steps.", low=0)
    policy: Literal["previous", "sft"] = key(
        "previous",
        "Where a round's policy starts; the KL penalty always holds on to the SFT model.",
    )
