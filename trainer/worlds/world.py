"""What a built-in world is to the rest of the house: a source of everything a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trainer.batch.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Base(Protocol):
    """Made from a seed, with no file fetched."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def model_config(self) -> PreTrainedConfig: ...

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A small causal language model with fresh weights."""
        ...

    def size(self, split: str, per_domain: int) -> int:
        """How many prompts a split has ("train", "eval" or "ood"), or how many demonstrations there
        are ("demonstrations"); an evaluation has `per_domain` of each domain."""
        ...


class World(Base, Protocol):
    """One that speaks token ids of its own. Gold judges and never trains."""

    def speaks(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether its token ids mean what this world's do."""
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


class TextWorld(Base, Protocol):
    """One whose rows are text, like those of a file, for whichever tokenizer the policy has."""

    def rows(self, split: str, n: int) -> list[dict[str, Any]]:
        """About `n` rows of a split or of the demonstrations: prompt, response, domain, and what
        the judge has to know."""
        ...

    def identity(self) -> list[Any]:
        """Changes when the rows do."""
        ...

    def gold(self, row: dict[str, Any], answer: str) -> float:
        """1: right."""
        ...

    def well_formed(self, row: dict[str, Any], answer: str) -> bool:
        """Whether it looks like an answer, right or wrong."""
        ...
