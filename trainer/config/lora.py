"""Adapters of low rank on one frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, filled, key

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Lora(Section, at="lora"):
    """Policy, critic and reward model as adapters on one base, which is the reference as well."""

    rank: int = key(
        0,
        "Rank of the adapters of policy, critic and reward model; 0: no adapters, all weights are "
        "trained.",
        low=0,
        high=4096,
        basic=True,
    )
    alpha: float = key(32.0, "What an adapter adds is scaled by alpha / rank.", above=0)
    targets: str | tuple[str, ...] = key(
        ALL_LINEAR,
        "Layers that get an adapter, by the ends of their names; all-linear: every linear layer "
        "but the head. Of lm_head and embed_tokens only the policy has adapters.",
        filled("all-linear, or names of layers"),
    )
    dropout: float = key(
        0.0,
        "Dropout in front of the adapters, while they are trained: their log-probabilities are "
        "then not quite those that sampled.",
        low=0,
        below=1,
    )
    critic_rank: int = key(
        0,
        "Rank of the critic's adapter, where it is another; not less than that of a reward model's "
        "adapter that it starts from.",
        low=0,
        high=4096,
    )
    quantize: Literal["none", "nf4"] = key(
        "none",
        "The base's layers in 4 bits (bitsandbytes), whole on every rank; nf4 needs "
        "rollout.engine=hf, which samples from these very weights.",
    )
    sft: bool = key(
        True,
        "Stage sft, too, trains an adapter, which is merged into the base that it leaves; false: "
        "it trains all weights.",
    )
    sync: Literal["adapter", "merged"] = key(
        "adapter",
        "vLLM: what a sync brings: the adapter alone, on a base that is there; or all weights, "
        "with the adapter in them.",
    )

    @property
    def active(self) -> bool:
        return self.rank > 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def relations(self) -> None:
        names = {*self.names}
        self.require(
            ALL_LINEAR not in names or names <= {ALL_LINEAR, "lm_head", "embed_tokens"},
            "targets",
            "names, or all-linear with at most lm_head and embed_tokens beside it",
        )
        self.require(
            self.quantize == "none" or self.active, "rank", "1 or more with lora.quantize=nf4"
        )
