"""The world of reasoning problems: which families, how many of each, and its small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.fields import Section, among, filled, key, require

FAMILIES = (
    *("spell_backward", "number_filtering", "chain_sum", "number_sequence", "products"),
    *("gcd", "leg_counting", "letter_counting", "needle_haystack"),
    *("basic_arithmetic", "decimal_chain_sum"),
)
"""Of reasoning-gym, with settings of ours (worlds/reasoning.py)."""


@dataclass(frozen=True, kw_only=True)
class Reasoning(Section, at="reasoning"):
    """Problems of reasoning-gym, each family a domain, with an exact check of every answer."""

    seed: int = key(0, "Seed of the problems; runs with other run.seed share them.", low=0)
    shares: Mapping[str, float] = key(
        {
            "number_filtering": 0.30,
            "chain_sum": 0.20,
            "number_sequence": 0.15,
            "gcd": 0.15,
            "decimal_chain_sum": 0.10,
            "leg_counting": 0.10,
        },
        "Families and their shares of the training prompts.",
        filled("at least one family"),
        among(FAMILIES),
        above=0,
        basic=True,
    )
    held_out: tuple[str, ...] = key(
        ("basic_arithmetic", "products"),
        "Families that training never has: out of distribution, beside harder problems of the "
        "others.",
        among(FAMILIES),
    )
    demonstrations: int = key(48000, "Problems with their solutions, for stage sft.", low=1)
    prompts: int = key(16384, "Problems that PPO draws from.", low=1)
    vocabulary: int = key(512, "Tokens of its tokenizer, learnt from the problems.", low=320)
    hidden: int = key(192, "Width of its model.", low=1)
    layers: int = key(5, "Its depth.", low=1)
    heads: int = key(6, "Its attention heads.", low=1)
    intermediate: int = key(576, "Width of its MLP.", low=1)

    def relations(self) -> None:
        for name in self.held_out:
            require(name not in self.shares, "reasoning.held_out", name, "families not in shares")
        self.require(
            self.hidden % (2 * self.heads) == 0,
            "hidden",
            f"a multiple of 2 * heads ({2 * self.heads})",
        )
