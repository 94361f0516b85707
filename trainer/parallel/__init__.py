"""Several ranks and one result; how a finished model meets the machine.

ranks    what the loop asks of the others: sums, shares, randomness that depends on names alone
place    a model onto this rank's device, or its shards over several; precision
"""

from trainer.parallel.place import autocast, blocks, place, unsharded
from trainer.parallel.ranks import (
    all_max,
    all_sum,
    all_true,
    any_true,
    barrier,
    cpu_group,
    describe,
    device,
    first_failure,
    gather_objects,
    generator,
    init_group,
    is_main,
    local,
    mesh,
    peak_memory_bytes,
    rank,
    share,
    start,
    stop,
    tell_failure,
    whole,
    world_size,
)

__all__ = [
    "all_max",
    "all_sum",
    "all_true",
    "any_true",
    "autocast",
    "barrier",
    "blocks",
    "cpu_group",
    "describe",
    "device",
    "first_failure",
    "gather_objects",
    "generator",
    "init_group",
    "is_main",
    "local",
    "mesh",
    "peak_memory_bytes",
    "place",
    "rank",
    "share",
    "start",
    "stop",
    "tell_failure",
    "unsharded",
    "whole",
    "world_size",
]
