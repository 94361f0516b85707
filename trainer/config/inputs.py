"""What a run starts from: models, data, or the built-in world."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.fields import choices, want

OPERATIONS = ("copy", "reverse", "sort", "increment", "rotate", "swap")


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
        want(self.policy != "", "model.policy", self.policy, "a path, a name, or toy")
        want(self.critic != "", "model.critic", self.critic, "reward, policy, or a path")


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
            want(allowed, f"data.columns.{each.name}", value, "a column's name")


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
        want(
            self.max_prompt_tokens > 0,
            "data.max_prompt_tokens",
            self.max_prompt_tokens,
            "1 or more",
        )
        for key in ("max_answer_tokens", "limit", "eval_limit"):
            want(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "0 (all) or more")
        for key in ("demonstrations", "prompts", "pairs"):
            want(getattr(self, key) != "", f"data.{key}", "", "a path, a name, or toy")


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
        want(self.seed >= 0, "toy.seed", self.seed, "0 or more")
        want(len(self.shares) > 0, "toy.shares", dict(self.shares), "at least one domain")
        for name, share in self.shares.items():
            want(name in OPERATIONS, f"toy.shares.{name}", name, choices(name, OPERATIONS))
            want(share > 0, f"toy.shares.{name}", share, "more than 0")
        for key in ("lazy", "pairs"):
            for name, share in getattr(self, key).items():
                want(name in self.shares, f"toy.{key}.{name}", name, choices(name, self.domains))
                want(0 <= share <= 1, f"toy.{key}.{name}", share, "a share, 0 to 1")
        seen = [name for name in self.shares if self.pairs.get(name, 1) > 0]
        want(len(seen) > 0, "toy.pairs", dict(self.pairs), "more than 0 for some domain")
        want(2 <= self.symbols <= 18, "toy.symbols", self.symbols, "2 to 18")
        want(self.min_length >= 2, "toy.min_length", self.min_length, "2 or more")
        want(
            self.min_length <= self.max_length <= 16,
            "toy.max_length",
            self.max_length,
            f"min_length ({self.min_length}) to 16",
        )
        want(
            self.held_length == 0 or self.min_length <= self.held_length <= self.max_length,
            "toy.held_length",
            self.held_length,
            f"0, or {self.min_length} to {self.max_length}",
        )
        want(0 <= self.flourish <= 1, "toy.flourish", self.flourish, "a share, 0 to 1")
        for key in ("flourish_penalty", "missing_eos_penalty", "noise", "liking"):
            want(getattr(self, key) >= 0, f"toy.{key}", getattr(self, key), "0 or more")
        for key in ("demonstrations", "prompts", "hidden", "layers", "heads", "intermediate"):
            want(getattr(self, key) > 0, f"toy.{key}", getattr(self, key), "1 or more")
        want(
            self.hidden % (2 * self.heads) == 0,
            "toy.hidden",
            self.hidden,
            f"a multiple of 2 * heads ({2 * self.heads})",
        )
