"""Replace functions of somebody's package wherever it has imported them, and put them back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def rebind(package: str, pairs: list[tuple[Any, Any]]) -> None:
    """In every loaded module of `package`, names bound to the first of a pair get the second.

    Looks into the module's own dictionary: a lazy module would import things when asked.
    """
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for attribute, value in list(vars(module).items()):
                for old, new in pairs:
                    if value is old:
                        setattr(module, attribute, new)


@contextmanager
def replaced(package: str, pairs: list[tuple[Any, Any]]) -> Iterator[None]:
    """`from module import name` copies the binding, so both ways in and out visit all modules.

    That covers modules which are first imported inside the block. Blocks nest: an inner one finds
    nothing bound to the originals, and on its way out would undo the outer one, so it is a no-op.
    """
    pairs = [(old, new) for old, new in pairs if old is not new]
    rebind(package, pairs)
    try:
        yield
    finally:
        rebind(package, [(new, old) for old, new in pairs])
