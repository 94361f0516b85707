"""Checks of arguments at the public boundary.

Each raises ValueError that names the argument, says what came and what is wanted. They look at
shapes, dtypes and Python numbers only, so they cost no synchronisation and trace under
torch.compile; values inside tensors are checked by the operations themselves, on the CPU.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd.forward_ad import unpack_dual

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def wrong(name: str, got: object, want: str) -> ValueError:
    return ValueError(f"{name}: got {describe(got)}, want {want}")


def tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], kind: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise wrong(name, x, f"a {kind} tensor")
    if x.dtype not in dtypes:
        raise wrong(name, x, f"a {kind} tensor")
    return x


def floats(name: str, x: object) -> Tensor:
    return tensor(name, x, FLOATS, "floating-point")


def ints(name: str, x: object) -> Tensor:
    return tensor(name, x, INTS, "integer")


def bools(name: str, x: object) -> Tensor:
    return tensor(name, x, (torch.bool,), "bool")


def shape(name: str, x: Tensor, want: tuple[int, ...], meaning: str) -> Tensor:
    """No broadcasting anywhere: (S, T) against (S, 1) is more often a bug than a wish."""
    if tuple(x.shape) != tuple(want):
        raise wrong(name, x, f"shape {tuple(want)}, {meaning}")
    return x


def dims(name: str, x: Tensor, count: int, meaning: str) -> Tensor:
    if x.dim() != count:
        raise wrong(name, x, f"{count} dimension(s), {meaning}")
    return x


def same_device(**tensors: Tensor | None) -> None:
    """The first one given is the one the others have to join."""
    named = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in named[1:]:
        if x.device != named[0][1].device:
            raise wrong(name, x, f"the device of {named[0][0]}, {named[0][1].device}")


def number(
    name: str,
    x: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """A finite number, numpy's too, within bounds; `above` and `below` are exclusive."""
    if not isinstance(x, (int, float)) and isinstance(x, Real):
        x = float(x)  # numpy's float32, which is no float
    plain = isinstance(x, (int, float)) and not isinstance(x, bool)
    # Comparisons alone: math.isfinite cannot be asked of torch.compile's symbols.
    if plain and above < x < below and at_least <= x <= at_most:  # type: ignore[operator]
        return x  # type: ignore[return-value]
    limits = ((">", above), (">=", at_least), ("<", below), ("<=", at_most))
    bounds = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
    raise wrong(name, x, " and ".join(["a finite number", *bounds]))


def whole(name: str, x: object, *, at_least: int) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < at_least:
        raise wrong(name, x, f"an integer >= {at_least}")
    return x


def one_of(name: str, x: object, options: tuple[str, ...]) -> str:
    if not isinstance(x, str) or x not in options:
        raise wrong(name, x, f"one of {', '.join(map(repr, options))}")
    return x


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Without the import, which takes half a second."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def rows_of_one_rank(**tensors: Tensor | None) -> None:
    """Of sharded rows each rank has its own, and nothing here would gather or split them."""
    for name, x in tensors.items():
        if is_dtensor(x):
            raise ValueError(
                f"{name}: got a DTensor placed {x.placements}, want a plain tensor: "
                f"{name}.to_local() where each rank has rows of its own, or {name}.full_tensor()"
            )


def not_sharded(name: str, x: Tensor) -> Tensor:
    """A DTensor head would be gathered piece by piece, or crash deep inside a kernel."""
    if is_dtensor(x):
        raise ValueError(
            f"{name}: got a DTensor, sharded over {x.device_mesh}, want a plain tensor. Call the "
            f"operation inside the head module's forward(), where FSDP has gathered the weight, or "
            f"pass {name}.full_tensor()"
        )
    return x


def denominator(x: object, mask: Tensor) -> float | Tensor:
    """The global number of tokens: a number, or a 0-d tensor so that no rank has to wait for it. Or
    each token's own, of the shape of mask: an answer's length times the number of answers."""
    if not isinstance(x, Tensor):
        return number("denom", x, above=0)
    if x.dim() and x.shape != mask.shape:
        raise wrong("denom", x, f"a number, or one for each token, {tuple(mask.shape)}")
    return x


def caps(cap_low: object, cap_high: object) -> None:
    low = number("cap_low", cap_low, at_least=0)
    number("cap_high", cap_high, at_least=low)


def backward_only(**tensors: Tensor | None) -> None:
    """An operation with a gradient and no tangent: forward-mode differentiation would take it for a
    constant without a word, and torch.func.grad fail with words that name neither."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is None:
            continue
        if unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: got a tangent (jvp), want backward() and no other")
        if is_gradtrackingtensor(x):
            raise NotImplementedError(
                f"{name}: got a tensor of torch.func.grad or vjp, want torch.autograd.grad or "
                "backward()"
            )


def ids_within(name: str, ids: Tensor, count: int) -> None:
    """For use inside an operation, on values. On a GPU it would have to wait, so it looks away:
    each operation says what becomes of an id out of range there."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name}: got ids from {low} to {high}, want 0 to {count - 1}")
