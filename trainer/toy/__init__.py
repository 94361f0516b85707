"""The built-in world: an RLHF problem in miniature, made from a seed."""

from trainer.toy.world import World

__all__ = ["World"]
