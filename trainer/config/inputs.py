"""What a run starts from: models, or the built-in world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, among, choices, filled, key, require

OPERATIONS = ("copy", "reverse", "sort", "increment", "rotate", "swap")
SOURCE = "a path, a name, or toy"
SHARE = "a share, 0 to 1"


@dataclass(frozen=True, kw_only=True)
class Model(Section, at="model"):
    policy: str = key(
        "toy",
        "Where the policy starts: a path, a Hugging Face name, or a world, toy or reasoning "
        "(built from its section).",
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
        "Sequences side by side in one row, without padding, in place of model.attention; auto: "
        "where the model can; off: padded, as the model's own attention wants it.",
    )
    kernels: Literal["auto", "triton", "reference"] = key(
        "auto",
        "Our operations: the best that runs here; or reference, PyTorch in chunks, where a GPU "
        "misbehaves with Triton (gi doctor --kernels tells).",
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
        False,
        "Keep the reference policy in the CPU's memory; it visits the GPU block by block.",
    )
    offload_reward: bool = key(False, "The same of the reward model.")
    offload_critic: bool = key(
        False,
        "The same of the critic, whose moments and masters are then updated in the CPU's memory.",
    )
    offload_activations: bool = key(
        False,
        "What the backward pass needs waits in the CPU's memory; with gradient_checkpointing, of "
        "which it is the blocks' inputs.",
    )
    trust_remote_code: bool = key(False, "Let transformers run code that comes with a model.")

    def relations(self) -> None:
        self.require(
            not self.offload_activations or self.gradient_checkpointing,
            "gradient_checkpointing",
            "true with model.offload_activations=true: else every number of every layer would go",
        )


@dataclass(frozen=True, kw_only=True)
class Toy(Section, at="toy"):
    """The built-in world: symbol transduction with a gold reward computed by program."""

    seed: int = key(0, "Seed of the world; runs with other run.seed share it.", low=0, high=2**62)
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
    demonstrations: int = key(64000, "Demonstrations for stage sft.", low=1, high=100_000_000)
    prompts: int = key(16384, "Prompts that PPO draws from.", low=1, high=100_000_000)
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
    hidden: int = key(128, "Its width.", low=1, high=65536)
    layers: int = key(3, "Its depth.", low=1, high=1000)
    heads: int = key(4, "Its attention heads.", low=1, high=1024)
    intermediate: int = key(384, "Width of its MLP.", low=1, high=1_000_000)

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
