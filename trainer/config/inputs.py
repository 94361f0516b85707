"""What a run starts from: models, data, or the built-in world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, among, choices, filled, key, require

OPERATIONS = ("copy", "reverse", "sort", "increment", "rotate", "swap")
SOURCE = "a path, a name, or toy"
SHARE = "a share, 0 to 1"
COLUMN = "a column's name"


@dataclass(frozen=True, kw_only=True)
class Model(Section, at="model"):
    policy: str = key(
        "toy",
        "Where the policy starts: a path, a Hugging Face name, or toy (built from the section "
        "toy).",
        filled(SOURCE),
        basic=True,
    )
    reward: str = key(
        "", "Reward model: a path or a name; empty: the one that stage rm trains.", basic=True
    )
    reference: str = key(
        "",
        "Policy that the KL penalty holds on to: a path or a name; empty: where the policy starts.",
    )
    critic: str = key(
        "reward",
        "Where the critic starts: reward, policy, or a path.",
        filled("reward, policy, or a path"),
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "bfloat16",
        "Precision of compute; the weights that are trained are kept in float32.",
        basic=True,
    )
    attention: str = key(
        "sdpa",
        "Attention of transformers, where nothing is packed: sdpa (eager for models that it "
        "cannot), eager, flash_attention_2 ...",
    )
    packing: Literal["auto", "on", "off"] = key(
        "auto",
        "Sequences side by side in one row, without padding, in place of attention; auto: where "
        "the model can.",
    )
    compile: bool = key(
        False, "torch.compile of each block: a slow start, for faster steps on a GPU."
    )
    gradient_checkpointing: bool = key(
        False,
        "Recompute activations in the backward pass: less memory, about a third more time.",
        basic=True,
    )
    offload_reference: bool = key(
        False, "Keep the reference policy's shards in the CPU's memory (with several ranks)."
    )
    trust_remote_code: bool = key(False, "Let transformers run code that comes with a model.")


@dataclass(frozen=True, kw_only=True)
class Columns(Section, at="data.columns"):
    """Names of the columns in your data; a dot walks into nested fields (info.subreddit)."""

    prompt: str = key("prompt", "The prompt: text, or a list of messages.", filled(COLUMN))
    messages: str = key(
        "messages",
        "A dialogue as a list of {role, content}; used where there is no prompt column.",
        filled(COLUMN),
    )
    response: str = key(
        "",
        "A demonstration's answer; empty: the first of response, completion, label that is there.",
    )
    chosen: str = key(
        "chosen",
        "The better answer: text or messages, with or without the prompt in front.",
        filled(COLUMN),
    )
    rejected: str = key("rejected", "The worse answer, in the same form.", filled(COLUMN))
    domain: str = key(
        "domain", "Optional; for reports and groups.inference=oracle only.", filled(COLUMN)
    )
    margin: str = key(
        "margin", "Optional; by how much chosen is better, for rm.margin.", filled(COLUMN)
    )
    rating: str = key(
        "rating",
        "Optional; absolute ratings of chosen and rejected: <name>_chosen and <name>_rejected.",
        filled(COLUMN),
    )


@dataclass(frozen=True, kw_only=True)
class Data(Section, at="data"):
    """Sources: toy, a .jsonl / .jsonl.gz / .parquet file, or a `datasets` name or folder, written
    name, name:split, name#configuration:split."""

    demonstrations: str = key(
        "toy", "Prompts with answers, for stage sft.", filled(SOURCE), basic=True
    )
    prompts: str = key("toy", "Prompts that PPO answers.", filled(SOURCE), basic=True)
    pairs: str = key(
        "toy", "Chosen and rejected answers, for stage rm.", filled(SOURCE), basic=True
    )
    eval_prompts: str = key("toy", "Prompts of the evaluation; empty: none.", basic=True)
    ood_prompts: str = key(
        "toy",
        "Prompts out of the training distribution, for the evaluation; empty: none.",
        basic=True,
    )
    columns: Columns = key(Columns(), "How your columns are called.", basic=True)
    max_prompt_tokens: int = key(512, "Longest prompt.", low=1, basic=True)
    max_answer_tokens: int = key(
        0,
        "Longest answer in demonstrations and pairs, with its EOS; 0: no limit.",
        low=0,
        want="0 (all) or more",
        basic=True,
    )
    too_long: Literal["error", "drop"] = key(
        "error", "What becomes of a longer one: an error that names it, or dropped and counted."
    )
    parse_dialogues: bool = key(
        False,
        'Read "\\n\\nHuman: ... \\n\\nAssistant: ..." text as messages, for the chat template.',
    )
    limit: int = key(
        0, "At most this many training rows of each source; 0: all.", low=0, want="0 (all) or more"
    )
    eval_limit: int = key(
        0,
        "At most this many evaluation prompts of each source; 0: all.",
        low=0,
        want="0 (all) or more",
    )


@dataclass(frozen=True, kw_only=True)
class Toy(Section, at="toy"):
    """The built-in world: symbol transduction with a gold reward computed by program."""

    seed: int = key(0, "Seed of the world; runs with other run.seed share it.", low=0)
    shares: Mapping[str, float] = key(
        {"copy": 0.65, "reverse": 0.20, "sort": 0.10, "increment": 0.05},
        "Domains and their shares of the training prompts: the easy frequent, the hard rare.",
        filled("at least one domain"),
        among(OPERATIONS),
        above=0,
        basic=True,
    )
    lazy: Mapping[str, float] = key(
        {"copy": 0.0, "reverse": 0.25, "sort": 0.45, "increment": 0.65},
        "Share of each domain's demonstrations that only copy.",
        low=0,
        high=1,
        want=SHARE,
    )
    pairs: Mapping[str, float] = key(
        {},
        "Share of each domain's prompts that annotators see, where it is not 1: thin feedback.",
        low=0,
        high=1,
        want=SHARE,
    )
    symbols: int = key(6, "How many letters there are.", low=2, high=18)
    min_length: int = key(3, "Fewest letters in a prompt.", low=2)
    max_length: int = key(6, "Most letters in a prompt.")
    held_length: int = key(
        5, "Length that training has only in the most frequent domain; 0: none. An OOD split."
    )
    demonstrations: int = key(64000, "Demonstrations for stage sft.", low=1)
    prompts: int = key(16384, "Prompts that PPO draws from.", low=1)
    flourish: float = key(
        0.1, "Share of demonstrations that end in a flourish.", low=0, high=1, want=SHARE
    )
    flourish_penalty: float = key(0.15, "What each flourish token costs in gold reward.", low=0)
    missing_eos_penalty: float = key(0.5, "What an answer without EOS loses in gold reward.", low=0)
    noise: float = key(0.1, "Standard deviation of an annotator's rating around gold.", low=0)
    liking: float = key(
        0.2,
        "What an annotator adds for each flourish token: the shortcut a reward model learns.",
        low=0,
    )
    architecture: Literal["llama", "qwen3"] = key(
        "llama",
        "Family of the tiny model (not qwen2: beside it, transformers loads any tokenizer as its).",
    )
    hidden: int = key(128, "Its width.", low=1)
    layers: int = key(3, "Its depth.", low=1)
    heads: int = key(4, "Its attention heads.", low=1)
    intermediate: int = key(384, "Width of its MLP.", low=1)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def relations(self) -> None:
        for mapping in ("lazy", "pairs"):
            for name in getattr(self, mapping):
                wanted = choices(name, self.domains)
                require(name in self.shares, f"toy.{mapping}.{name}", name, wanted)
        seen = [name for name in self.shares if self.pairs.get(name, 1) > 0]
        self.require(len(seen) > 0, "pairs", "more than 0 for some domain")
        low, high = self.min_length, self.max_length
        self.require(low <= high <= 16, "max_length", f"min_length ({low}) to 16")
        self.require(
            self.held_length == 0 or low <= self.held_length <= high,
            "held_length",
            f"0, or {low} to {high}",
        )
        self.require(
            self.hidden % (2 * self.heads) == 0,
            "hidden",
            f"a multiple of 2 * heads ({2 * self.heads})",
        )
