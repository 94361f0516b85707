"""Policy optimisation: scores of answers, how they are sampled, PPO, groups, the KL penalty."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import check_training, want


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    function: str = ""
    """package.module:function."""
    weight: float = 1.0
    """Its weight in the sum."""
    name: str = ""
    """Its name in the metrics; empty: the function's."""

    def __post_init__(self) -> None:
        want(
            re.fullmatch(r"[\w.]+:[\w.]+", self.function) is not None,
            "reward.functions",
            self.function,
            "package.module:function",
        )

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Reward:
    functions: tuple[RewardFunction, ...] = ()
    """Python functions that add to the score: a list of {function, weight, name}."""
    model_weight: float = 1.0
    """Weight of the reward model in the sum; 0: functions alone, and no model is loaded."""
    normalise: Literal["none", "std", "meanstd"] = "std"
    """Divide by the running standard deviation, or subtract the running mean as well."""
    clip: float = 5.0
    """Scores are clipped to +- this, after normalising; 0: off."""
    truncated_penalty: float = 0.0
    """Taken off the score of an answer that was cut at the length limit."""

    def __post_init__(self) -> None:
        want(self.clip >= 0, "reward.clip", self.clip, "0 (off) or more")
        want(
            self.truncated_penalty >= 0,
            "reward.truncated_penalty",
            self.truncated_penalty,
            "0 or more",
        )
        want(
            self.model_weight != 0 or len(self.functions) > 0,
            "reward.model_weight",
            self.model_weight,
            "anything but 0 when there is no reward function",
        )
        names = [each.label for each in self.functions]
        want(len(set(names)) == len(names), "reward.functions", names, "a different name for each")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    engine: Literal["hf", "vllm"] = "hf"
    """What generates: a Hugging Face model on every rank, or vLLM."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities everywhere are those at this temperature."""
    top_p: float = 1.0
    """Held at 1: the log-probabilities must be those of the policy that sampled."""
    logprob_bound: float = 1.0
    """The run stops when the engine's and the trainer's log-probabilities differ by more."""
    batch: int = 128
    """Sequences that generate together; with vLLM: at most, on each engine."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside EOS; the tokens that spell one stay in the answer."""
    tensor_parallel: int = 1
    """vLLM: ranks that share one engine; a divisor of the number of ranks."""
    gpu_memory: float = 0.4
    """vLLM: share of a GPU's memory for its weights and cache while it generates."""
    sleep: bool = True
    """vLLM on GPUs: that memory belongs to the trainer while it trains."""
    cuda_graphs: bool = True
    """vLLM on GPUs: captured graphs; a start of minutes, for faster generation."""
    sync_bucket_mb: int = 512
    """vLLM: the ranks' shards are gathered in pieces of at most this (or of one tensor)."""
    timeout: float = 300.0
    """vLLM: seconds without a sign of life after which the process ends."""

    def __post_init__(self) -> None:
        want(self.max_new_tokens > 0, "rollout.max_new_tokens", self.max_new_tokens, "1 or more")
        want(self.temperature > 0, "rollout.temperature", self.temperature, "more than 0")
        want(
            self.top_p == 1,
            "rollout.top_p",
            self.top_p,
            "1: with less, log-probabilities would not be those of the policy that sampled",
        )
        want(self.logprob_bound > 0, "rollout.logprob_bound", self.logprob_bound, "more than 0")
        for key in ("batch", "tensor_parallel", "sync_bucket_mb"):
            want(getattr(self, key) > 0, f"rollout.{key}", getattr(self, key), "1 or more")
        want(all(self.stop), "rollout.stop", list(self.stop), "texts that are not empty")
        want(0 < self.gpu_memory < 1, "rollout.gpu_memory", self.gpu_memory, "between 0 and 1")
        want(self.timeout > 0, "rollout.timeout", self.timeout, "more than 0")
        want(
            self.engine != "vllm" or self.temperature >= 0.01,
            "rollout.temperature",
            self.temperature,
            "0.01 or more with engine=vllm, which would use 0.01 instead",
        )


@dataclass(frozen=True, kw_only=True)
class Ppo:
    steps: int = 500
    """Iterations: rollouts, then updates."""
    prompts_per_step: int = 64
    """Prompts an iteration, over all ranks."""
    samples_per_prompt: int = 1
    """Answers to each prompt."""
    ppo_epochs: int = 1
    """Passes over an iteration's answers."""
    minibatches: int = 4
    """Optimiser steps in one pass."""
    lr: float = 1e-6
    """Learning rate of the policy."""
    critic_lr: float = 5e-6
    """Learning rate of the critic."""
    warmup: int = 10
    """Iterations over which both learning rates rise."""
    critic_warmup_steps: int = 20
    """Iterations before the policy starts to move."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm, of the policy and of the critic."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: float = 0.0
    """With a negative advantage the loss is bounded at dual_clip * |A|; more than 1, or 0: off."""
    value_clip: float = 0.2
    """Values are clipped to +- this around the old ones; 0: off."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_in_loss: bool = False
    """The KL penalty stands in the loss and not in the rewards."""
    advantages: Literal["gae", "group_norm", "leave_one_out"] = "gae"
    """With a critic, or from the other answers to the same prompt."""
    norm: Literal["none", "batch", "group"] = "batch"
    """Normalise advantages over the batch, or within each inferred group."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weigh the policy loss by trainer's over engine's probability, of each token or sequence."""
    importance_cap: float = 2.0
    """Largest such weight: truncated importance sampling."""

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def has_critic(self) -> bool:
        return self.advantages == "gae"

    def __post_init__(self) -> None:
        check_training("ppo", self)
        for key in ("prompts_per_step", "samples_per_prompt", "ppo_epochs", "minibatches"):
            want(getattr(self, key) > 0, f"ppo.{key}", getattr(self, key), "1 or more")
        want(
            self.sequences_per_step % self.minibatches == 0,
            "ppo.minibatches",
            self.minibatches,
            f"a divisor of prompts_per_step * samples_per_prompt = {self.sequences_per_step}",
        )
        want(self.critic_lr > 0, "ppo.critic_lr", self.critic_lr, "more than 0")
        want(
            self.critic_warmup_steps >= 0,
            "ppo.critic_warmup_steps",
            self.critic_warmup_steps,
            "0 or more",
        )
        want(0 <= self.gamma <= 1, "ppo.gamma", self.gamma, "0 to 1")
        want(0 <= self.lam <= 1, "ppo.lam", self.lam, "0 to 1")
        want(0 < self.clip_low < 1, "ppo.clip_low", self.clip_low, "more than 0 and less than 1")
        want(self.clip_high > 0, "ppo.clip_high", self.clip_high, "more than 0")
        want(
            self.dual_clip == 0 or self.dual_clip > 1,
            "ppo.dual_clip",
            self.dual_clip,
            "more than 1, or 0 (off)",
        )
        want(self.value_clip >= 0, "ppo.value_clip", self.value_clip, "0 (off) or more")
        want(self.entropy_coef >= 0, "ppo.entropy_coef", self.entropy_coef, "0 or more")
        want(self.importance_cap >= 1, "ppo.importance_cap", self.importance_cap, "1 or more")
        want(
            self.has_critic or self.samples_per_prompt > 1,
            "ppo.samples_per_prompt",
            self.samples_per_prompt,
            f"2 or more with advantages={self.advantages}, which compares answers to one prompt",
        )


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Group-invariant learning: find the hard groups, weigh them, relax their KL penalty."""

    inference: Literal["exact", "adversarial", "oracle", "random", "none"] = "exact"
    """How groups are found; none: plain PPO."""
    num_groups: int = 4
    """M. Group 0 is the hardest. With oracle: the number of the data's domains."""
    assign: Literal["hard", "soft"] = "hard"
    """hard: sequences ranked by the head, cut where the rank's variance between groups is largest;
    soft: the head's probabilities, which one noisy return a sequence keeps close to each other."""
    focus: float = 1.0
    """Share of a step's prompts that are drawn so that each group is met equally often; 0: prompts
    as they come. Needs on=prompt."""
    pool: int = 4
    """Prompts that the head looks at for each one that is drawn, where focus > 0."""
    performance: Literal["raw", "over_reference", "quantile", "rating"] = "over_reference"
    """What is compared between prompts: the score, or the score against reference answers'."""
    reference_answers: int = 4
    """Answers of the reference policy to each prompt, for over_reference and quantile."""
    on: Literal["prompt", "response"] = "prompt"
    """Which token the head reads: the prompt's last, or the answer's."""
    returns: Literal["score", "penalised"] = "score"
    """R_i: the score, or the score less the KL penalty."""
    form: Literal["mass", "uniform", "one_sided"] = "mass"
    """Form of the between-group variance."""
    beta: float = 0.0
    """Weight of the variance in the policy's objective: scales advantages, 1 in the paper; 0: no
    policy weights. Beside focus they cost more than they bring (docs/evidence.md)."""
    critic_beta: float = 1.0
    """Weight of the head's loss beside the critic's."""
    balance: float = 0.1
    """Weight of log M - H(masses), against groups that swallow the rest (adversarial)."""
    clamp: tuple[float, float] = (0.0, 5.0)
    """Bounds of a sequence's weight."""
    min_size: int = 8
    """Fewest sequences in a group of the exact partition."""
    head_lr: float = 1e-3
    """Learning rate of the head."""
    ema: float = 0.9
    """Memory of each group's running return, which holds the order of labels."""
    objective: Literal["variance", "group_dro", "cvar", "sequence_variance"] = "variance"
    """What weighs the sequences: the method, or a control."""
    dro_lr: float = 0.01
    """Step of group_dro's weights."""
    cvar_alpha: float = 0.3
    """Worst share of sequences that cvar trains on."""

    @property
    def active(self) -> bool:
        return self.inference != "none"

    @property
    def has_head(self) -> bool:
        return self.inference in ("exact", "adversarial")

    @property
    def compared(self) -> str:
        """performance; plain PPO compares no prompts, and asks for no reference answers."""
        return self.performance if self.active else "raw"

    def __post_init__(self) -> None:
        want(2 <= self.num_groups <= 64, "groups.num_groups", self.num_groups, "2 to 64")
        want(
            self.reference_answers > 0,
            "groups.reference_answers",
            self.reference_answers,
            "1 or more",
        )
        for key in ("beta", "critic_beta", "balance"):
            want(getattr(self, key) >= 0, f"groups.{key}", getattr(self, key), "0 or more")
        low, high = self.clamp
        want(low <= high, "groups.clamp", list(self.clamp), "[low, high] with low <= high")
        want(self.min_size > 0, "groups.min_size", self.min_size, "1 or more")
        want(self.head_lr > 0, "groups.head_lr", self.head_lr, "more than 0")
        want(0 <= self.ema < 1, "groups.ema", self.ema, "[0, 1)")
        want(0 <= self.focus <= 1, "groups.focus", self.focus, "a share, 0 to 1")
        want(self.pool >= 2, "groups.pool", self.pool, "2 or more")
        want(
            not (self.focus and self.has_head and self.on == "response"),
            "groups.on",
            self.on,
            "prompt where groups.focus > 0: prompts are drawn before they have a response",
        )
        want(self.dro_lr > 0, "groups.dro_lr", self.dro_lr, "more than 0")
        want(0 < self.cvar_alpha <= 1, "groups.cvar_alpha", self.cvar_alpha, "(0, 1]")


@dataclass(frozen=True, kw_only=True)
class Kl:
    coef: float = 0.05
    """eta. Adaptive lowers the mean coefficient (objective/kl_coef), so it wants a larger eta."""
    adaptive: bool = True
    """Per sequence: eta * (floor + (1 - floor) * p_easiest); relaxed where it is hard."""
    floor: float = 0.5
    """kappa: what is left of eta outside the easiest group. The paper has 0, which a reward model
    that knows little of hard data pays for (docs/evidence.md)."""
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """Of the KL at a token; exact: over the whole vocabulary."""
    controller: bool = False
    """Hold each group at its own KL target."""
    target: tuple[float, ...] = (6.0,)
    """KL of a sequence, in nats, for the controller: one for all groups, or one for each."""
    controller_rate: float = 0.1
    """eta_g <- eta_g * (1 + rate * clip(KL_g / target_g - 1, -0.2, 0.2))."""

    def __post_init__(self) -> None:
        want(self.coef >= 0, "kl.coef", self.coef, "0 or more")
        want(0 <= self.floor <= 1, "kl.floor", self.floor, "0 to 1")
        want(
            len(self.target) > 0 and all(each > 0 for each in self.target),
            "kl.target",
            list(self.target),
            "numbers more than 0",
        )
        want(self.controller_rate > 0, "kl.controller_rate", self.controller_rate, "more than 0")
