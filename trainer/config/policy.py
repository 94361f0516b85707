"""Policy optimisation: how answers are sampled, PPO, groups, the KL penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, key, such_that


@dataclass(frozen=True, kw_only=True)
class Rollout(Section, at="rollout"):
    engine: Literal["hf", "vllm"] = key(
        "hf", "What generates: a Hugging Face model on every rank, or vLLM.", basic=True
    )
    max_new_tokens: int = key(256, "Longest answer.", low=1, basic=True)
    temperature: float = key(
        1.0,
        "Sampling temperature; log-probabilities everywhere are those at this temperature.",
        above=0,
        basic=True,
    )
    top_p: float = key(
        1.0,
        "Sample from the fewest tokens that have this probability together; log-probabilities "
        "everywhere are those of what is left, renormalised.",
        above=0,
        high=1,
        want="more than 0, at most 1 (off)",
    )
    top_k: int = key(
        0, "And of those from the k most probable; 0: off.", low=0, want="0 (off) or more"
    )
    logprob_bound: float = key(
        1.0,
        "The run stops when the engine's and the trainer's log-probabilities differ by more.",
        above=0,
    )
    batch: int = key(
        128, "engine=hf: sequences that generate together, on each rank.", low=1, basic=True
    )
    max_num_seqs: int = key(
        512, "vLLM: at most so many sequences generate together, on each engine.", low=1
    )
    seeded: bool = key(
        True,
        "vLLM: a seed for each answer, drawn one by one; false: faster, but answers depend on "
        "what they are batched with.",
    )
    stop: tuple[str, ...] = key(
        (),
        "Texts that end an answer, beside EOS; the tokens that spell one stay in the answer.",
        such_that(all, "texts that are not empty"),
        basic=True,
    )
    tensor_parallel: int = key(
        1, "vLLM: ranks that share one engine; a divisor of the number of ranks.", low=1
    )
    gpu_memory: float | str = key(
        0.4,
        "vLLM: share of a GPU's memory for its weights and cache while it generates; auto: of what "
        "is left when the trainer's weights and moments are there.",
        such_that(
            lambda share: share == "auto" or (not isinstance(share, str) and 0 < share < 1),
            "between 0 and 1, or auto",
        ),
    )
    sleep: bool = key(True, "vLLM on GPUs: that memory belongs to the trainer while it trains.")
    cuda_graphs: bool = key(
        True, "vLLM on GPUs: captured graphs; a start of minutes, for faster generation."
    )
    sync_bucket_mb: int = key(
        512,
        "vLLM: the ranks' shards are gathered in pieces of at most this (or of one tensor).",
        low=1,
        result=False,
    )
    timeout: float = key(
        300.0,
        "vLLM: seconds without a sign of life after which the process ends.",
        above=0,
        result=False,
    )

    def relations(self) -> None:
        self.require(
            self.engine != "vllm" or self.temperature >= 0.01,
            "temperature",
            "0.01 or more with engine=vllm, which would use 0.01 instead",
        )
        self.require(
            self.engine != "vllm" or self.top_p == 1 or self.top_k > 0,
            "top_k",
            "1 or more with engine=vllm and top_p < 1: it tells so many of the tokens that are "
            "left; 512 seldom cuts any",
        )
        self.require(
            self.gpu_memory != "auto" or self.sleep,
            "sleep",
            "true with rollout.gpu_memory=auto: while the trainer trains it wants that memory back",
        )

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, kw_only=True)
class Ppo(Section, at="ppo"):
    steps: int = key(500, "Iterations: rollouts, then updates.", low=0, basic=True)
    prompts_per_step: int = key(64, "Prompts an iteration, over all ranks.", low=1, basic=True)
    samples_per_prompt: int = key(1, "Answers to each prompt.", low=1, basic=True)
    ppo_epochs: int = key(1, "Passes over an iteration's answers.", low=1)
    minibatches: int = key(4, "Optimiser steps in one pass.", low=1, basic=True)
    lr: float = key(1e-6, "Learning rate of the policy.", above=0, basic=True)
    critic_lr: float = key(5e-6, "Learning rate of the critic.", above=0, basic=True)
    warmup: int = key(10, "Iterations over which both learning rates rise.", low=0)
    critic_warmup_steps: int = key(20, "Iterations before the policy starts to move.", low=0)
    weight_decay: float = key(0.0, "AdamW's weight decay.", low=0)
    grad_clip: float = key(1.0, "Largest gradient norm, of the policy and of the critic.", above=0)
    gamma: float = key(1.0, "Discount.", low=0, high=1)
    lam: float = key(0.95, "GAE's lambda.", low=0, high=1)
    loss: Literal["ppo", "gspo", "cispo"] = key(
        "ppo",
        "ppo: each token's ratio is clipped; gspo: each answer's; cispo: no token is dropped, its "
        "weight is capped.",
    )
    aggregate: Literal["token", "sequence", "constant"] = key(
        "token",
        "How the loss is averaged: every token alike, every answer alike, or a sum over "
        "rollout.max_new_tokens times the answers (Dr. GRPO, with advantages=leave_one_out). gspo "
        "averages over answers by itself: then it is for the penalties in the loss.",
    )
    clip_low: float = key(0.2, "loss=ppo: clipped at 1 - clip_low.", above=0, below=1)
    clip_high: float = key(0.2, "loss=ppo: clipped at 1 + clip_high.", above=0)
    gspo_clip: tuple[float, float] = key(
        (3e-4, 4e-4),
        "loss=gspo: an answer's ratio is clipped at 1 - the first and 1 + the second.",
        such_that(lambda clip: 0 < clip[0] < 1 and clip[1] > 0, "[low, high] more than 0"),
    )
    cispo_cap: tuple[float, float] = key(
        (0.0, 5.0),
        "loss=cispo: bounds of a token's weight.",
        such_that(lambda cap: 0 <= cap[0] <= cap[1], "[low, high] with 0 <= low <= high"),
    )
    dual_clip: float = key(
        0.0,
        "loss=ppo: with a negative advantage the loss is bounded at dual_clip * |A|; more than 1, "
        "or 0: off.",
        such_that(lambda clip: clip == 0 or clip > 1, "more than 1, or 0 (off)"),
    )
    value_clip: float = key(
        0.2,
        "Values are clipped to +- this around the old ones; 0: off.",
        low=0,
        want="0 (off) or more",
    )
    entropy_coef: float = key(0.0, "Weight of the entropy bonus.", low=0)
    kl_in_loss: bool = key(False, "The KL penalty stands in the loss and not in the rewards.")
    advantages: Literal["gae", "group_norm", "leave_one_out"] = key(
        "gae", "With a critic, or from the other answers to the same prompt.", basic=True
    )
    norm: Literal["none", "batch", "group"] = key(
        "batch", "Normalise advantages over the batch, or within each inferred group."
    )
    importance: Literal["none", "token", "sequence"] = key(
        "none",
        "Weigh the policy loss by trainer's over engine's probability, of each token or sequence.",
    )
    importance_cap: float = key(2.0, "Largest such weight.", low=1)
    importance_beyond: Literal["cap", "mask"] = key(
        "cap",
        "A larger one becomes importance_cap (truncated importance sampling) or 0: the token or "
        "the answer is left out (masked importance sampling).",
    )

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def has_critic(self) -> bool:
        return self.advantages == "gae"

    def relations(self) -> None:
        self.require(
            self.sequences_per_step % self.minibatches == 0,
            "minibatches",
            f"a divisor of prompts_per_step * samples_per_prompt = {self.sequences_per_step}",
        )
        self.require(
            self.has_critic or self.samples_per_prompt > 1,
            "samples_per_prompt",
            f"2 or more with advantages={self.advantages}, which compares answers to one prompt",
        )
        self.require(
            self.loss != "gspo" or not self.has_critic,
            "advantages",
            "group_norm or leave_one_out with loss=gspo: one advantage for an answer",
        )
        self.require(
            self.loss != "gspo" or self.importance != "token",
            "importance",
            "none or sequence with loss=gspo: one weight for an answer",
        )


@dataclass(frozen=True, kw_only=True)
class Groups(Section, at="groups"):
    """Group-invariant learning: find the hard groups, weigh them, relax their KL penalty."""

    inference: Literal["exact", "adversarial", "oracle", "random", "none"] = key(
        "exact", "How groups are found; none: plain PPO.", basic=True
    )
    num_groups: int = key(
        4,
        "M. Group 0 is the hardest. With oracle: the number of the data's domains.",
        low=2,
        high=64,
        basic=True,
    )
    assign: Literal["hard", "soft"] = key(
        "hard",
        "hard: sequences ranked by the head, cut where the rank's variance between groups is "
        "largest; soft: the head's probabilities, which one noisy return a sequence keeps "
        "close to each other.",
    )
    draw: Literal["even", "variance", "gdro", "progress", "signal", "bandit", "dynamic", "none"] = (
        key(
            "even",
            "Which prompts are answered. even: each group equally often; variance: as the paper's "
            "objective asks; gdro, progress, bandit, signal: neighbours from the literature; "
            "dynamic: as they come, less those whose answers all score the same; none: as they "
            "come.",
            basic=True,
        )
    )
    focus: float = key(
        1.0,
        "Share of a step's prompts that are drawn by that rule, the others as they come; 0: as "
        "draw=none. Needs on=prompt.",
        low=0,
        high=1,
        want="a share, 0 to 1",
    )
    draw_beta: float = key(1.0, "draw=variance: weight of the variance between groups.", low=0)
    draw_rate: float = key(0.05, "draw=gdro, progress: step of the rates.", low=0)
    draw_floor: float = key(
        0.02, "Least share of a step's prompts for a group that there is.", low=0, below=1
    )
    draw_rounds: int = key(
        3, "draw=dynamic: at most so many times a step's prompts are sampled.", low=2, high=100
    )
    pool: int = key(
        16,
        "Prompts to choose from for each one that is drawn, where groups choose.",
        low=2,
        high=1000,
    )
    refresh: int = key(
        32,
        "Steps that renew the pool: so old is what the head said of a prompt at most, and so much "
        "less it is asked; 1: a new pool at every step.",
        low=1,
    )
    performance: Literal["raw", "over_reference", "quantile", "rating"] = key(
        "over_reference",
        "What is compared between prompts: the score, or the score against reference answers'.",
        basic=True,
    )
    reference_answers: int = key(
        4, "Answers of the reference policy to each prompt, for over_reference and quantile.", low=1
    )
    reference_cache: str = key(
        "",
        "Folder in which runs share the scores of reference answers; empty: in the run folder, for "
        "the run and its baselines.",
        result=False,
    )
    on: Literal["prompt", "response"] = key(
        "prompt", "Which token the head reads: the prompt's last, or the answer's."
    )
    returns: Literal["score", "penalised"] = key(
        "score", "R_i: the score, or the score less the KL penalty."
    )
    form: Literal["mass", "uniform", "one_sided"] = key(
        "mass", "Form of the between-group variance."
    )
    beta: float = key(
        0.0,
        "Weight of the variance in the policy's objective: scales advantages, 1 in the paper; "
        "0: no policy weights. Beside focus they cost more than they bring "
        "(docs/evidence.md).",
        low=0,
        basic=True,
    )
    critic_beta: float = key(1.0, "Weight of the head's loss beside the critic's.", low=0)
    balance: float = key(
        0.1,
        "Weight of log M - H(masses), against groups that swallow the rest (adversarial).",
        low=0,
    )
    clamp: tuple[float, float] = key(
        (0.0, 5.0),
        "Bounds of a sequence's weight.",
        such_that(lambda clamp: clamp[0] <= clamp[1], "[low, high] with low <= high"),
    )
    min_size: int = key(8, "Fewest sequences in a group of the exact partition.", low=1)
    head_lr: float = key(1e-3, "Learning rate of the head.", above=0)
    ema: float = key(
        0.9,
        "Memory of each group's running return, which holds the order of labels.",
        low=0,
        below=1,
    )
    objective: Literal["variance", "group_dro", "cvar", "sequence_variance"] = key(
        "variance", "What weighs the sequences: the method, or a control."
    )
    dro_lr: float = key(0.01, "Step of group_dro's weights.", above=0)
    cvar_alpha: float = key(0.3, "Worst share of sequences that cvar trains on.", above=0, high=1)

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

    @property
    def choose(self) -> bool:
        """Whether the groups choose prompts, from a pool."""
        return self.active and self.focus > 0 and self.draw not in ("dynamic", "none")

    def relations(self) -> None:
        self.require(
            not (self.choose and self.has_head and self.on == "response"),
            "on",
            f"prompt with groups.draw={self.draw}: prompts are drawn before they have a response",
        )
        self.require(
            self.draw != "dynamic" or self.compared in ("raw", "rating"),
            "draw",
            f"another rule than dynamic with groups.performance={self.performance}, whose "
            "reference answers are sampled before a step's prompts are known",
        )


@dataclass(frozen=True, kw_only=True)
class Kl(Section, at="kl"):
    coef: float = key(
        0.05,
        "eta. Adaptive lowers the mean coefficient (objective/kl_coef), so it wants a larger eta.",
        low=0,
        basic=True,
    )
    adaptive: bool = key(
        True,
        "A coefficient for each sequence, by its group: eta where it is easy, less where it is "
        "hard (shape, floor).",
        basic=True,
    )
    floor: float = key(
        0.5,
        "kappa: what is left of eta for the hardest group. The paper has 0, which a "
        "reward model that knows little of hard data pays for (docs/evidence.md).",
        low=0,
        high=1,
        basic=True,
    )
    shape: Literal["easiest", "graded"] = key(
        "graded",
        "Adaptive: from floor * eta to eta in equal steps, hardest group to easiest; or eta for "
        "the easiest and floor * eta for all others. With two groups they are the same.",
    )
    estimator: Literal["k1", "k2", "k3", "exact"] = key(
        "k1", "Of the KL at a token; exact: over the whole vocabulary."
    )
    controller: bool = key(False, "Hold each group at its own KL target.")
    target: tuple[float, ...] = key(
        (6.0,),
        "KL of a sequence, in nats, for the controller: one for all groups, or one for each.",
        such_that(
            lambda target: target and all(each > 0 for each in target), "numbers more than 0"
        ),
    )
    controller_rate: float = key(
        0.1, "eta_g <- eta_g * (1 + rate * clip(KL_g / target_g - 1, -0.2, 0.2)).", above=0
    )
