"""What a built-in world is to the rest of the house: a source of everything a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from trainer.batch.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class World(Protocol):
    """Made from a seed, with no file fetched. Gold judges and never trains."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def model_config(self) -> PreTrainedConfig: ...

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A small causal language model with fresh weights."""
        ...

    def speaks(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether its token ids mean what this world's do."""
        ...

    def size(self, split: str, per_domain: int) -> int:
        """How many prompts a split has ("train", "eval" or "ood"), or how many demonstrations there
        are ("demonstrations"); an evaluation has `per_domain` of each domain."""
        ...

    def prompts(self, n: int, split: str = "train", seed: int = 0) -> list[Prompt]: ...

    def demonstrations(self, n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids with EOS)."""
        ...

    def gold(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> float: ...

    def annotated(self, prompts: Sequence[Prompt], seed: int = 0) -> list[Prompt]:
        """Those that annotators see."""
        ...

    def annotate(
        self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], seed: int = 0
    ) -> list[float]:
        """What an annotator says of answers to one prompt."""
        ...
