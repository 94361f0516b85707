"""The worlds by name: wherever a configuration names a model or a source, it may name one of them.

A new world is one file beside this one, a section of the configuration, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from trainer.config import Config
from trainer.worlds import toy
from trainer.worlds.world import World

WORLDS: dict[str, Callable[[Config], World]] = {"toy": lambda config: toy.World(config.toy)}


def is_world(name: object) -> TypeGuard[str]:
    """Several sources are never one: a world stands alone."""
    return isinstance(name, str) and name in WORLDS


def world(name: str, config: Config) -> World:
    return WORLDS[name](config)
