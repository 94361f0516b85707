"""The worlds by name: wherever a configuration names a model or a source, it may name one of them.

A new world is one file beside this one, a section of the configuration, and a line here: among the
WORLDS, which speak token ids of their own, or the TEXT_WORLDS, whose rows are like a file's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from trainer.config import Config
from trainer.worlds import reasoning, toy
from trainer.worlds.world import Base, TextWorld, World

WORLDS: dict[str, Callable[[Config], World]] = {"toy": lambda config: toy.World(config.toy)}
TEXT_WORLDS: dict[str, Callable[[Config], TextWorld]] = {
    "reasoning": lambda config: reasoning.World(config.reasoning)
}


def is_world(name: object) -> TypeGuard[str]:
    """Several sources are never one: a world stands alone."""
    return isinstance(name, str) and (name in WORLDS or name in TEXT_WORLDS)


def is_text_world(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name in TEXT_WORLDS


def has_ids(name: object) -> TypeGuard[str]:
    """Whether it is a world that speaks token ids of its own."""
    return isinstance(name, str) and name in WORLDS


def base(name: str, config: Config) -> Base:
    """What all worlds have: a tokenizer and a model."""
    return WORLDS[name](config) if name in WORLDS else TEXT_WORLDS[name](config)


def world(name: str, config: Config) -> World:
    return WORLDS[name](config)


def text_world(name: str, config: Config) -> TextWorld:
    return TEXT_WORLDS[name](config)
