"""Numbers that change from call to call under torch.compile.

torch.compile turns a float that was another one last time into a symbol, computed from a 0-d tensor
that the graph takes. A custom operation with a float argument makes a constant of it all the same:
a compilation for each value, and an error at the limit. As tensors they pass. Plain numbers, all of
them without torch.compile, stay what they are: a tensor would have to be made for every call.

    carried, numbers = changing(temperature, softcap)     # in the public function
    op(x, *numbers, carried)
    temperature, softcap = settled(carried, *numbers)     # in the operation
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Number = float | None


def changes(x: Number) -> bool:
    """Whether it is a symbol of torch.compile's and no number yet."""
    if x is None or not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # half a second of sympy

    return not has_static_value(x)


def changing(*numbers: Number) -> tuple[Tensor | None, list[Any]]:
    """Those that change as a float64 tensor on the CPU, or None, and the numbers without them."""
    if not any(map(changes, numbers)):
        return None, list(numbers)
    # Only arithmetic with tensors is taken from the symbols; torch.tensor would make constants.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    carried = torch.stack([one if x is None else one * x for x in numbers])
    return carried, [x if x is None else 1.0 for x in numbers]


def settled(carried: Tensor | None, *numbers: Number) -> list[Any]:
    """The numbers again, inside the operation; None stays None."""
    if carried is None:
        return list(numbers)
    return [x if x is None else y for x, y in zip(numbers, carried.tolist())]


def as_tensors(device: torch.device, dtype: torch.dtype, *numbers: Number) -> list[Any]:
    """For a composed formula: the numbers as they are, or, where one changes, all as tensors ()."""
    carried, kept = changing(*numbers)
    if carried is None:
        return kept
    return [x if x is None else y for x, y in zip(kept, carried.to(device, dtype).unbind())]


def scalar(x: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """() on the device of `like`."""
    if torch.compiler.is_compiling():
        return like.new_ones((), dtype=dtype) * x
    return like.new_full((), x, dtype=dtype)


def bounds(low: float, high: float, device: torch.device) -> tuple[Any, Any]:
    """For `clamp`, which makes constants of symbols, too: as they are, or both as tensors."""
    if not (changes(low) or changes(high)):
        return low, high
    one = torch.ones((), dtype=torch.float64, device=device)
    return one * low, one * high
