"""A prompt, and a pair of answers to one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: list[int]
    text: str
    domain: str | None = None
    messages: Messages | None = None
    """What the text was made of, where a chat template made it."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The whole row it came from, for reward functions."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None
    rating_chosen: float | None = None
    rating_rejected: float | None = None
