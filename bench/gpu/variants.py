"""The head's forward in other tiles: for whoever tunes it, not for use.

A variant replaces fields of the tile that the kernels ask for (`blocks_for`) or how many
programs are started on a multiprocessor. A field that the tile does not have is a switch that the
kernel does not have (yet): the variant is absent and says so. So to try a new switch, give
`Blocks` a field, read it in the kernel, and add a line here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from bench.ops.peers import Absent, Contender, Inputs, Outputs, gikernels_linear_logprobs, needs_gpu

# Where the kernels ask, of which one is there.
TILES = ("gikernels.vocabulary.launch", "gikernels.vocabulary.tiles", "gikernels.tiles")
PROGRAMS = "programs"  # on a multiprocessor
VARIANTS: dict[str, dict[str, Any]] = {
    "flatten": {"flatten": True},
    "no flatten": {"flatten": False},
    "3 stages": {"num_stages": 3},
    "5 stages": {"num_stages": 5},
    "128 x 128, two programs": {"rows": 128, "cols": 128, "num_warps": 4, PROGRAMS: 2},
    "128 x 128, 8 warps": {"rows": 128, "cols": 128},
}


def contender(name: str) -> Contender:
    def run(inputs: Inputs) -> Outputs:
        needs_gpu(inputs["hidden"], "a variant of the Triton kernel")
        with using(VARIANTS[name]) as asked:
            out = gikernels_linear_logprobs(inputs)
        if not asked:
            raise Absent("the forward does not ask blocks_for")
        return out

    return Contender(name, run, forward_only=True)


@contextlib.contextmanager
def using(changes: dict[str, Any]) -> Iterator[list[Any]]:
    """The kernels in other tiles; yields what they were given, which is empty if they never ask."""
    tiles = _tiles()
    blocks_for, programs = tiles.blocks_for, tiles.programs
    times = changes.get(PROGRAMS, 1)
    fields = {name: value for name, value in changes.items() if name != PROGRAMS}
    asked: list[Any] = []

    def replaced(*args: Any, **kwargs: Any) -> Any:
        block = blocks_for(*args, **kwargs)
        for name in fields:
            if name not in block._fields:
                raise Absent(f"the kernel has no switch {name!r}")
        asked.append(block._replace(**fields))
        return asked[-1]

    def more(device: Any, items: int) -> int:
        least = programs(device, 1 << 30)
        return min(items, times * least)

    tiles.blocks_for, tiles.programs = replaced, more
    try:
        yield asked
    finally:
        tiles.blocks_for, tiles.programs = blocks_for, programs


def _tiles() -> Any:
    for name in TILES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "blocks_for") and hasattr(module, "programs"):
                return module
    raise Absent("no blocks_for to replace")
