"""Every setting of a run: frozen dataclasses, one doc line under each field, and a strict loader.

    config = load("toy", ["groups.beta=0", "kl.adaptive=false"])     # a packaged name, or a path

A configuration file is YAML whose top-level keys are the sections below; what it leaves out keeps
its default. Overrides are `section.key=value`, with the value read as YAML. Unknown keys, wrong
types and values that make no sense raise a ConfigError of one line, which names the file and line
(or the override) and the key. Nothing here imports torch, so `gi --help` stays quick.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml

PACKAGED = Path(__file__).parent / "configs"
STAGES = ("sft", "rm", "ppo", "metarm")
# What the runs under `baselines` may change: they share the SFT and the reward model.
BASELINE_SECTIONS = ("reward", "rollout", "ppo", "groups", "kl")
OPERATIONS = ("copy", "reverse", "sort", "increment", "rotate", "swap")


class ConfigError(ValueError):
    """One line: where it was said (file:line or override), which key, what is wrong."""

    for_user = True

    def __init__(self, problem: str, key: str = "", where: str = ""):
        self.problem, self.key, self.where = problem, key, where
        super().__init__(": ".join(part for part in (where, key, problem) if part))


def _want(holds: bool, key: str, got: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"is {got!r}; want {wanted}", key)


@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0
    """Seed of everything random in the run (the toy world has its own, toy.seed)."""
    output: str = ""
    """Run folder; empty: runs/<name of the configuration>."""
    stages: tuple[str, ...] = ("sft", "rm", "ppo")
    """What `train` does, in this order; of sft, rm, ppo, metarm."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    ranks: int = 0
    """How many ranks --dry-run plans for; 0: as many as it runs on."""

    def __post_init__(self) -> None:
        _want(self.seed >= 0, "run.seed", self.seed, "0 or more")
        _want(self.threads >= 0, "run.threads", self.threads, "0 (torch's choice) or more")
        _want(self.ranks >= 0, "run.ranks", self.ranks, "0 or more")
        _want(len(self.stages) > 0, "run.stages", list(self.stages), f"some of {list(STAGES)}")
        for stage in self.stages:
            _want(stage in STAGES, "run.stages", stage, _choices(stage, STAGES))
        _want(
            len(set(self.stages)) == len(self.stages),
            "run.stages",
            list(self.stages),
            "each stage once",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    policy: str = "toy"
    """Where the policy starts: a path, a Hugging Face name, or toy (built from the section toy)."""
    reward: str = ""
    """Reward model: a path or a name; empty: the one that stage rm trains."""
    reference: str = ""
    """Policy that the KL penalty holds on to: a path or a name; empty: where the policy starts."""
    critic: str = "reward"
    """Where the critic starts: reward, policy, or a path."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of compute; the weights that are trained are kept in float32."""
    attention: str = "sdpa"
    """Attention of transformers: sdpa, eager, flash_attention_2 ..."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Sequences side by side in one row, without padding; auto: on a GPU. In place of attention."""
    compile: bool = False
    """torch.compile of each block: a slow start, for faster steps on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_reference: bool = False
    """Keep the reference policy's shards in the CPU's memory (with several ranks)."""
    trust_remote_code: bool = False
    """Let transformers run code that comes with a model."""

    def __post_init__(self) -> None:
        _want(self.policy != "", "model.policy", self.policy, "a path, a name, or toy")
        _want(self.critic != "", "model.critic", self.critic, "reward, policy, or a path")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns in your data; a dot walks into nested fields (info.subreddit)."""

    prompt: str = "prompt"
    """The prompt: text, or a list of messages."""
    messages: str = "messages"
    """A dialogue as a list of {role, content}; used where there is no prompt column."""
    response: str = ""
    """A demonstration's answer; empty: the first of response, completion, label that is there."""
    chosen: str = "chosen"
    """The better answer: text or messages, with or without the prompt in front."""
    rejected: str = "rejected"
    """The worse answer, in the same form."""
    domain: str = "domain"
    """Optional; for reports and groups.inference=oracle only."""
    margin: str = "margin"
    """Optional; by how much chosen is better, for rm.margin."""
    rating: str = "rating"
    """Optional; absolute ratings of chosen and rejected: <name>_chosen and <name>_rejected."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            allowed = value != "" or each.name == "response"
            _want(allowed, f"data.columns.{each.name}", value, "a column's name")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Sources: toy, a .jsonl / .jsonl.gz / .parquet file, or a `datasets` name or folder, written
    name, name:split, name#configuration:split."""

    demonstrations: str = "toy"
    """Prompts with answers, for stage sft."""
    prompts: str = "toy"
    """Prompts that PPO answers."""
    pairs: str = "toy"
    """Chosen and rejected answers, for stage rm."""
    eval_prompts: str = "toy"
    """Prompts of the evaluation; empty: none."""
    ood_prompts: str = "toy"
    """Prompts out of the training distribution, for the evaluation; empty: none."""
    columns: Columns = field(default_factory=Columns)
    """How your columns are called."""
    max_prompt_tokens: int = 512
    """Longest prompt."""
    max_answer_tokens: int = 0
    """Longest answer in demonstrations and pairs, with its EOS; 0: no limit."""
    too_long: Literal["error", "drop"] = "error"
    """What becomes of a longer one: an error that names it, or dropped and counted."""
    parse_dialogues: bool = False
    """Read "\\n\\nHuman: ... \\n\\nAssistant: ..." text as messages, for the chat template."""
    limit: int = 0
    """At most this many training rows of each source; 0: all."""
    eval_limit: int = 0
    """At most this many evaluation prompts of each source; 0: all."""

    def __post_init__(self) -> None:
        _want(
            self.max_prompt_tokens > 0,
            "data.max_prompt_tokens",
            self.max_prompt_tokens,
            "1 or more",
        )
        for key in ("max_answer_tokens", "limit", "eval_limit"):
            _want(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "0 (all) or more")
        for key in ("demonstrations", "prompts", "pairs"):
            _want(getattr(self, key) != "", f"data.{key}", "", "a path, a name, or toy")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The built-in world: symbol transduction with a gold reward computed by program."""

    seed: int = 0
    """Seed of the world; runs with other run.seed share it."""
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"copy": 0.65, "reverse": 0.20, "sort": 0.10, "increment": 0.05}
    )
    """Domains and their shares of the training prompts: the easy frequent, the hard rare."""
    lazy: Mapping[str, float] = field(
        default_factory=lambda: {"copy": 0.0, "reverse": 0.25, "sort": 0.45, "increment": 0.65}
    )
    """Share of each domain's demonstrations that only copy."""
    pairs: Mapping[str, float] = field(default_factory=dict)
    """Share of each domain's prompts that annotators see, where it is not 1: thin feedback."""
    symbols: int = 6
    """How many letters there are."""
    min_length: int = 3
    """Fewest letters in a prompt."""
    max_length: int = 6
    """Most letters in a prompt."""
    held_length: int = 5
    """Length that training has only in the most frequent domain; 0: none. An OOD split."""
    demonstrations: int = 64000
    """Demonstrations for stage sft."""
    prompts: int = 16384
    """Prompts that PPO draws from."""
    flourish: float = 0.1
    """Share of demonstrations that end in a flourish."""
    flourish_penalty: float = 0.15
    """What each flourish token costs in gold reward."""
    missing_eos_penalty: float = 0.5
    """What an answer without EOS loses in gold reward."""
    noise: float = 0.1
    """Standard deviation of an annotator's rating around gold."""
    liking: float = 0.2
    """What an annotator adds for each flourish token: the shortcut a reward model learns."""
    architecture: Literal["llama", "qwen3"] = "llama"
    """Family of the tiny model (not qwen2: beside it, transformers loads any tokenizer as its)."""
    hidden: int = 128
    """Its width."""
    layers: int = 3
    """Its depth."""
    heads: int = 4
    """Its attention heads."""
    intermediate: int = 384
    """Width of its MLP."""

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def __post_init__(self) -> None:
        _want(self.seed >= 0, "toy.seed", self.seed, "0 or more")
        _want(len(self.shares) > 0, "toy.shares", dict(self.shares), "at least one domain")
        for name, share in self.shares.items():
            _want(name in OPERATIONS, f"toy.shares.{name}", name, _choices(name, OPERATIONS))
            _want(share > 0, f"toy.shares.{name}", share, "more than 0")
        for key in ("lazy", "pairs"):
            for name, share in getattr(self, key).items():
                _want(name in self.shares, f"toy.{key}.{name}", name, _choices(name, self.domains))
                _want(0 <= share <= 1, f"toy.{key}.{name}", share, "a share, 0 to 1")
        seen = [name for name in self.shares if self.pairs.get(name, 1) > 0]
        _want(len(seen) > 0, "toy.pairs", dict(self.pairs), "more than 0 for some domain")
        _want(2 <= self.symbols <= 18, "toy.symbols", self.symbols, "2 to 18")
        _want(self.min_length >= 2, "toy.min_length", self.min_length, "2 or more")
        _want(
            self.min_length <= self.max_length <= 16,
            "toy.max_length",
            self.max_length,
            f"min_length ({self.min_length}) to 16",
        )
        _want(
            self.held_length == 0 or self.min_length <= self.held_length <= self.max_length,
            "toy.held_length",
            self.held_length,
            f"0, or {self.min_length} to {self.max_length}",
        )
        _want(0 <= self.flourish <= 1, "toy.flourish", self.flourish, "a share, 0 to 1")
        for key in ("flourish_penalty", "missing_eos_penalty", "noise", "liking"):
            _want(getattr(self, key) >= 0, f"toy.{key}", getattr(self, key), "0 or more")
        for key in ("demonstrations", "prompts", "hidden", "layers", "heads", "intermediate"):
            _want(getattr(self, key) > 0, f"toy.{key}", getattr(self, key), "1 or more")
        _want(
            self.hidden % (2 * self.heads) == 0,
            "toy.hidden",
            self.hidden,
            f"a multiple of 2 * heads ({2 * self.heads})",
        )


def _check_training(section: str, config: Sft | Rm | Ppo) -> None:
    """What the three stages that train have in common."""
    _want(config.steps >= 0, f"{section}.steps", config.steps, "0 or more")
    _want(config.lr > 0, f"{section}.lr", config.lr, "more than 0")
    _want(config.warmup >= 0, f"{section}.warmup", config.warmup, "0 or more")
    _want(config.weight_decay >= 0, f"{section}.weight_decay", config.weight_decay, "0 or more")
    _want(config.grad_clip > 0, f"{section}.grad_clip", config.grad_clip, "more than 0")


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
        _check_training("sft", self)
        _want(self.batch > 0, "sft.batch", self.batch, "1 or more")


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
        _check_training("rm", self)
        _want(self.batch > 0, "rm.batch", self.batch, "1 or more")
        _want(0 <= self.label_smoothing < 1, "rm.label_smoothing", self.label_smoothing, "[0, 1)")
        _want(self.centring >= 0, "rm.centring", self.centring, "0 or more")
        _want(self.rating >= 0, "rm.rating", self.rating, "0 or more")
        _want(self.pairs > 0, "rm.pairs", self.pairs, "1 or more")
        _want(self.best_of >= 2, "rm.best_of", self.best_of, "2 or more")
        _want(0 <= self.validation < 1, "rm.validation", self.validation, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    function: str = ""
    """package.module:function."""
    weight: float = 1.0
    """Its weight in the sum."""
    name: str = ""
    """Its name in the metrics; empty: the function's."""

    def __post_init__(self) -> None:
        _want(
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
        _want(self.clip >= 0, "reward.clip", self.clip, "0 (off) or more")
        _want(
            self.truncated_penalty >= 0,
            "reward.truncated_penalty",
            self.truncated_penalty,
            "0 or more",
        )
        _want(
            self.model_weight != 0 or len(self.functions) > 0,
            "reward.model_weight",
            self.model_weight,
            "anything but 0 when there is no reward function",
        )
        names = [each.label for each in self.functions]
        _want(len(set(names)) == len(names), "reward.functions", names, "a different name for each")


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
        _want(self.max_new_tokens > 0, "rollout.max_new_tokens", self.max_new_tokens, "1 or more")
        _want(self.temperature > 0, "rollout.temperature", self.temperature, "more than 0")
        _want(
            self.top_p == 1,
            "rollout.top_p",
            self.top_p,
            "1: with less, log-probabilities would not be those of the policy that sampled",
        )
        _want(self.logprob_bound > 0, "rollout.logprob_bound", self.logprob_bound, "more than 0")
        for key in ("batch", "tensor_parallel", "sync_bucket_mb"):
            _want(getattr(self, key) > 0, f"rollout.{key}", getattr(self, key), "1 or more")
        _want(all(self.stop), "rollout.stop", list(self.stop), "texts that are not empty")
        _want(0 < self.gpu_memory < 1, "rollout.gpu_memory", self.gpu_memory, "between 0 and 1")
        _want(self.timeout > 0, "rollout.timeout", self.timeout, "more than 0")
        _want(
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
        _check_training("ppo", self)
        for key in ("prompts_per_step", "samples_per_prompt", "ppo_epochs", "minibatches"):
            _want(getattr(self, key) > 0, f"ppo.{key}", getattr(self, key), "1 or more")
        _want(
            self.sequences_per_step % self.minibatches == 0,
            "ppo.minibatches",
            self.minibatches,
            f"a divisor of prompts_per_step * samples_per_prompt = {self.sequences_per_step}",
        )
        _want(self.critic_lr > 0, "ppo.critic_lr", self.critic_lr, "more than 0")
        _want(
            self.critic_warmup_steps >= 0,
            "ppo.critic_warmup_steps",
            self.critic_warmup_steps,
            "0 or more",
        )
        _want(0 <= self.gamma <= 1, "ppo.gamma", self.gamma, "0 to 1")
        _want(0 <= self.lam <= 1, "ppo.lam", self.lam, "0 to 1")
        _want(0 < self.clip_low < 1, "ppo.clip_low", self.clip_low, "more than 0 and less than 1")
        _want(self.clip_high > 0, "ppo.clip_high", self.clip_high, "more than 0")
        _want(
            self.dual_clip == 0 or self.dual_clip > 1,
            "ppo.dual_clip",
            self.dual_clip,
            "more than 1, or 0 (off)",
        )
        _want(self.value_clip >= 0, "ppo.value_clip", self.value_clip, "0 (off) or more")
        _want(self.entropy_coef >= 0, "ppo.entropy_coef", self.entropy_coef, "0 or more")
        _want(self.importance_cap >= 1, "ppo.importance_cap", self.importance_cap, "1 or more")
        _want(
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
        _want(2 <= self.num_groups <= 64, "groups.num_groups", self.num_groups, "2 to 64")
        _want(
            self.reference_answers > 0,
            "groups.reference_answers",
            self.reference_answers,
            "1 or more",
        )
        for key in ("beta", "critic_beta", "balance"):
            _want(getattr(self, key) >= 0, f"groups.{key}", getattr(self, key), "0 or more")
        low, high = self.clamp
        _want(low <= high, "groups.clamp", list(self.clamp), "[low, high] with low <= high")
        _want(self.min_size > 0, "groups.min_size", self.min_size, "1 or more")
        _want(self.head_lr > 0, "groups.head_lr", self.head_lr, "more than 0")
        _want(0 <= self.ema < 1, "groups.ema", self.ema, "[0, 1)")
        _want(0 <= self.focus <= 1, "groups.focus", self.focus, "a share, 0 to 1")
        _want(self.pool >= 2, "groups.pool", self.pool, "2 or more")
        _want(
            not (self.focus and self.has_head and self.on == "response"),
            "groups.on",
            self.on,
            "prompt where groups.focus > 0: prompts are drawn before they have a response",
        )
        _want(self.dro_lr > 0, "groups.dro_lr", self.dro_lr, "more than 0")
        _want(0 < self.cvar_alpha <= 1, "groups.cvar_alpha", self.cvar_alpha, "(0, 1]")


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
        _want(self.coef >= 0, "kl.coef", self.coef, "0 or more")
        _want(0 <= self.floor <= 1, "kl.floor", self.floor, "0 to 1")
        _want(
            len(self.target) > 0 and all(each > 0 for each in self.target),
            "kl.target",
            list(self.target),
            "numbers more than 0",
        )
        _want(self.controller_rate > 0, "kl.controller_rate", self.controller_rate, "more than 0")


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
            _want(getattr(self, key) >= 0, f"metarm.{key}", getattr(self, key), "0 or more")
        for key in ("meta_prompts", "meta_batch", "test_prompts", "steps"):
            _want(getattr(self, key) > 0, f"metarm.{key}", getattr(self, key), "1 or more")
        _want(self.samples >= 2, "metarm.samples", self.samples, "2 or more: they are compared")
        _want(self.lr > 0, "metarm.lr", self.lr, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: int = 20
    """PPO steps between evaluations; 0: only before and after."""
    samples_per_domain: int = 256
    """Toy world: evaluation prompts a domain."""
    batch: int = 256
    """Sequences that are evaluated together."""
    final_samples: int = 8
    """Answers of each domain that the report shows, from the last evaluation."""

    def __post_init__(self) -> None:
        _want(self.every >= 0, "eval.every", self.every, "0 or more")
        _want(self.final_samples >= 0, "eval.final_samples", self.final_samples, "0 or more")
        for key in ("samples_per_domain", "batch"):
            _want(getattr(self, key) > 0, f"eval.{key}", getattr(self, key), "1 or more")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    tokens_per_microbatch: int = 8192
    """Tokens in one forward and backward, in every stage: memory and speed, never the result."""
    replicas: int = 1
    """Whole copies of each model, every one sharded over ranks / replicas (HSDP): one a node."""
    profile: bool = False
    """Write a torch profiler trace and a memory timeline of a few steps, into profile/."""
    profile_steps: tuple[int, ...] = (2, 3)
    """Which steps of each stage are profiled."""
    save_every: int = 50
    """Steps between checkpoints; 0: none but on SIGTERM. The final model is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    best: tuple[str, ...] = ("eval/proxy", "rm/validation_accuracy")
    """Metrics whose highest value marks the best checkpoint, kept as well; of those with one."""
    async_save: bool = False
    """Write checkpoints in the background: no waiting, for one more copy of the state in memory."""
    max_skipped: int = 5
    """The run stops after this many steps in a row with a NaN or infinite loss or gradient."""
    log: tuple[str, ...] = ()
    """Beside metrics.jsonl: tensorboard, wandb."""
    progress: bool = True
    """Show progress bars (only ever on a terminal)."""

    def __post_init__(self) -> None:
        _want(
            self.tokens_per_microbatch > 0,
            "trainer.tokens_per_microbatch",
            self.tokens_per_microbatch,
            "1 or more",
        )
        _want(self.save_every >= 0, "trainer.save_every", self.save_every, "0 or more")
        _want(self.keep_last > 0, "trainer.keep_last", self.keep_last, "1 or more")
        _want(self.replicas > 0, "trainer.replicas", self.replicas, "1 or more")
        _want(self.max_skipped > 0, "trainer.max_skipped", self.max_skipped, "1 or more")
        for sink in self.log:
            known = ("tensorboard", "wandb")
            _want(sink in known, "trainer.log", sink, _choices(sink, known))


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    """The run as a whole."""
    model: Model = field(default_factory=Model)
    """Policy, reward model, critic."""
    data: Data = field(default_factory=Data)
    """Where prompts, demonstrations and pairs come from."""
    toy: Toy = field(default_factory=Toy)
    """The built-in world."""
    sft: Sft = field(default_factory=Sft)
    """Stage 1: supervised fine-tuning."""
    rm: Rm = field(default_factory=Rm)
    """Stage 2: the reward model."""
    reward: Reward = field(default_factory=Reward)
    """What an answer scores."""
    rollout: Rollout = field(default_factory=Rollout)
    """How answers are sampled."""
    ppo: Ppo = field(default_factory=Ppo)
    """Stage 3: policy optimisation."""
    groups: Groups = field(default_factory=Groups)
    """Group-invariant learning."""
    kl: Kl = field(default_factory=Kl)
    """The KL penalty."""
    metarm: MetaRm = field(default_factory=MetaRm)
    """Rounds of a reward model that follows the policy."""
    eval: Eval = field(default_factory=Eval)
    """When and on how much the policy is evaluated."""
    trainer: Trainer = field(default_factory=Trainer)
    """Memory, checkpoints, logging."""
    baselines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further PPO runs beside this one, which share its SFT and reward model: name -> overrides."""

    def __post_init__(self) -> None:
        if self.groups.active:
            members = self.groups.num_groups * self.groups.min_size
            _want(
                self.groups.inference != "exact" or members <= self.ppo.sequences_per_step,
                "groups.min_size",
                self.groups.min_size,
                f"at most {self.ppo.sequences_per_step // self.groups.num_groups}: "
                f"{self.groups.num_groups} groups of a batch of {self.ppo.sequences_per_step}",
            )
            trains_the_rm = "rm" in self.run.stages and self.model.reward == ""
            _want(
                not (self.groups.performance == "rating" and trains_the_rm and self.rm.rating == 0),
                "groups.performance",
                "rating",
                "rm.rating > 0 with it: only then are scores of different prompts comparable",
            )
        _want(
            not self.kl.controller or len(self.kl.target) in (1, self.groups.num_groups),
            "kl.target",
            list(self.kl.target),
            f"one number, or one for each of {self.groups.num_groups} groups",
        )
        _want(
            not (self.model.critic == "reward" and self.reward.model_weight == 0)
            or not self.ppo.has_critic,
            "model.critic",
            "reward",
            "policy or a path: with reward.model_weight=0 there is no reward model to start from",
        )
        _want(
            self.metarm.rounds == 0 or self.model.reward == "",
            "metarm.rounds",
            self.metarm.rounds,
            "0 with model.reward: rounds go on with the reward model that stage rm made",
        )
        _want(
            self.metarm.rounds == 0 or self.reward.model_weight != 0,
            "metarm.rounds",
            self.metarm.rounds,
            "0 with reward.model_weight=0: there is no reward model",
        )
        _want(
            self.metarm.prompts == "train" or self.data.ood_prompts != "",
            "metarm.prompts",
            self.metarm.prompts,
            "train, or a source in data.ood_prompts",
        )
        _want(
            "metarm" not in self.run.stages or self.metarm.rounds > 0,
            "metarm.rounds",
            self.metarm.rounds,
            "1 or more with stage metarm",
        )
        for name in self.baselines:
            _want(
                re.fullmatch(r"[\w.+-]+", name) is not None,
                "baselines",
                name,
                "a name of letters, digits, . + - _",
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """What `train` does: the stages of the run, and MetaRM's rounds behind PPO if asked for."""
        rounds = self.metarm.rounds > 0 and "ppo" in self.run.stages
        asked = self.run.stages
        return (*asked, "metarm") if rounds and "metarm" not in asked else asked

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100, allow_unicode=True)

    def override(self, overrides: Sequence[str]) -> Config:
        """This configuration with some `section.key=value` applied, checked as when loaded."""
        return _resolve(self.to_dict(), {}, overrides, "")

    def baseline(self, name: str) -> Config:
        """The run `name` under `baselines`, in its own folder, with no baselines and no rounds."""
        inner = self.override(self.baselines[name])
        run = dataclasses.replace(self.run, output=str(Path(self.run.output, "baselines", name)))
        no_rounds = dataclasses.replace(inner.metarm, rounds=0)
        return dataclasses.replace(inner, run=run, metarm=no_rounds, baselines={})


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """A packaged configuration by name, or a file by path, with overrides."""
    path = find(name_or_path)
    data, lines = _read(path)
    return _resolve(data, lines, overrides, str(Path("runs", path.stem)))


def packaged() -> list[str]:
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError("no such file", where=name_or_path)
    inside = PACKAGED / f"{name_or_path}.yaml"
    if inside.is_file():
        return inside
    meant = did_you_mean(name_or_path, packaged())
    raise ConfigError(
        f"no packaged configuration of this name{meant}; there are {', '.join(packaged())}, "
        "and a path ends in .yaml",
        where=name_or_path,
    )


def differences(ours: Config, theirs: Config) -> list[str]:
    """`key: theirs -> ours` for every setting that changes a run's result, for messages."""
    cosmetic = (
        "run.output",
        "run.threads",
        "run.ranks",
        "trainer.progress",
        "trainer.log",
        "trainer.profile",
        "trainer.profile_steps",
        "trainer.save_every",
        "trainer.keep_last",
        "trainer.best",
        "trainer.async_save",
        "trainer.max_skipped",
        "rollout.sync_bucket_mb",
        "rollout.timeout",
    )
    a, b = flat(ours.to_dict()), flat(theirs.to_dict())
    return [
        f"{key}: {b.get(key)!r} -> {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in cosmetic
    ]


def as_yaml(value: Any) -> str:
    """A plain value in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()


def fields_of(section: type) -> list[tuple[str, str, Any, str]]:
    """(name, type, default, doc line) of each field of a section, read from this file's source."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    docs = {
        before.target.id: " ".join(after.value.value.split())
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    default = section()
    return [
        (each.name, str(each.type), _plain(getattr(default, each.name)), docs[each.name])
        for each in dataclasses.fields(section)
    ]


# Reading. YAML 1.1, which PyYAML speaks, takes `1e-4` for text and `on` for true. These are the
# rules of YAML 1.2's core schema instead.
class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false|True|False", list("tfTF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's plain data, and file:line of every key in it."""
    lines: dict[str, str] = {}
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"not YAML: {error.problem}", where=f"{path}{line}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split()), where=str(path)) from None

    def build(node: yaml.Node, key: str) -> Any:
        lines.setdefault(key, f"{path}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            out = {}
            for name_node, value_node in node.value:
                name = name_node.value
                inner = f"{key}.{name}" if key else str(name)
                if name in out:
                    where = f"{path}:{name_node.start_mark.line + 1}"
                    raise ConfigError(f"given twice, first at {lines[inner]}", inner, where)
                lines[inner] = f"{path}:{name_node.start_mark.line + 1}"
                out[name] = build(value_node, inner)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(each, f"{key}[{i}]") for i, each in enumerate(node.value)]
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split()), key, lines[key]) from None

    data = build(node, "") if node is not None else {}
    if not isinstance(data, dict):
        raise ConfigError("want sections with keys (section: {key: value})", where=str(path))
    return data, lines


def _resolve(
    data: dict[str, Any], lines: dict[str, str], overrides: Sequence[str], output: str
) -> Config:
    lines = dict(lines)
    try:
        for override in overrides:
            _apply(data, override, lines)
        config = _build(Config, data, "")
        for name, items in config.baselines.items():
            _check_baseline(config, name, items)
    except ConfigError as error:
        raise ConfigError(
            error.problem, error.key, error.where or _where(error.key, lines)
        ) from None
    if output and config.run.output == "":
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=output))
    return config


def _check_baseline(config: Config, name: str, items: Sequence[str]) -> None:
    alone = dataclasses.replace(config, baselines={})
    for item in items:
        section = item.partition(".")[0]
        if section not in BASELINE_SECTIONS and section in {
            f.name for f in dataclasses.fields(Config)
        }:
            raise ConfigError(
                f"{item!r} changes what baselines share; they may change "
                f"{', '.join(BASELINE_SECTIONS)}",
                f"baselines.{name}",
            )
    try:
        alone.override(items)
    except ConfigError as error:
        raise ConfigError(str(error), f"baselines.{name}") from None


def _where(key: str, lines: dict[str, str]) -> str:
    """Where `key`, or failing that what holds it, was said."""
    while key and key not in lines:
        key = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", key)
    return lines.get(key, "") if key else ""


def _apply(data: dict[str, Any], override: str, lines: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("want section.key=value", where=f"override {override!r}")
    key = key.strip()
    where = f"override {override!r}"
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"not YAML: {problem}", key, where) from None
    *above, last = key.split(".")
    place: Any = data
    for depth, name in enumerate(above):
        if name not in place:
            lines[".".join(above[: depth + 1])] = where
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError("holds one value and no keys", ".".join(above[: depth + 1]), where)
    place[last] = value
    lines[key] = where


def _build(section: type, data: Any, key: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"is {data!r}; want keys with values", key)
    known = {each.name: each for each in dataclasses.fields(section)}
    hints = get_type_hints(section)
    values = {}
    for name, value in data.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in known:
            what = "unknown key" if key else "unknown section"
            raise ConfigError(f"{what}{_suggest(str(name), section, key)}", inner)
        values[name] = _convert(value, hints[name], inner)
    try:
        return section(**values)
    except ConfigError as error:
        # A section in a list (a reward function) knows its section and not its place.
        at = key if "[" in key else error.key
        raise ConfigError(error.problem, at) from None


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type `kind`, or an error that names key, value and want."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        _want(value in inner, key, value, _choices(value, inner))
        return value
    if origin is tuple:
        _want(isinstance(value, list), key, value, f"a list of {_name(inner[0])}")
        if inner[-1] is not Ellipsis:
            _want(
                len(value) == len(inner), key, value, f"a list of {len(inner)} {_name(inner[0])}s"
            )
        return tuple(_convert(each, inner[0], f"{key}[{i}]") for i, each in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        _want(isinstance(value, dict), key, value, f"names, each with {_name(inner[1])}")
        return {
            str(name): _convert(each, inner[1], f"{key}.{name}") for name, each in value.items()
        }
    if kind is str and value is None:
        return ""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = type(value) is kind
    _want(right, key, value, _name(kind))
    _want(kind is not float or math.isfinite(value), key, value, "a finite number")
    return value


def _name(kind: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if kind in names:
        return names[kind]
    return "list" if get_origin(kind) is tuple else "mapping"


def _choices(value: Any, allowed: Sequence[str]) -> str:
    return f"one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _suggest(name: str, section: type, key: str) -> str:
    known = [each.name for each in dataclasses.fields(section)]
    near = did_you_mean(name, known)
    if near:
        return near
    # The key may be right and only its section wrong or missing.
    elsewhere = [
        f"{part}.{each.name}"
        for part, kind in get_type_hints(Config).items()
        if dataclasses.is_dataclass(kind)
        for each in dataclasses.fields(kind)
        if each.name == name
    ]
    if elsewhere:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    return f"; there are {', '.join(known)}"


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what YAML knows."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping | types.MappingProxyType):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{above}{name}."))
        else:
            out[f"{above}{name}"] = value
    return out
