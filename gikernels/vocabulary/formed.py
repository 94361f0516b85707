"""Losses whose gradients are formed in the forward: what they share.

The upstream gradient of a scalar is a factor, so the backward only multiplies. A second backward
through the same graph finds the gradients handed out, and computes them again.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gikernels.backends.symbols import scalar

BLOCK = 1 << 16  # numbers that are multiplied at once


class Places(NamedTuple):
    """Of some arguments among an operation's; hidden and weight are the first two."""

    denom: int
    bias: int
    backend: int
    wanted: int
    gradients: int  # among the outputs, the first of three


def denominators(
    denom: float | Tensor, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """One for all rows, and what share of it each row counts, where rows have their own: gradients
    of fp16 are divided by the one at the end, as they would underflow before."""
    if not isinstance(denom, Tensor):
        return scalar(denom, mask, dtype), None
    denom = denom.detach().to(mask.device, dtype)
    if denom.dim() == 0:
        return denom, None
    own = denom.masked_fill(~mask, torch.inf)
    least = torch.cat([own, own.new_full((1,), torch.finfo(torch.float32).max)]).amin()
    return least, least / own


def saved_dtype(weight: Tensor) -> torch.dtype:
    """Of fp16 the gradients come in fp32, of the sum and not of the loss: divided by denom they
    would underflow before a loss scale can help."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def scale_of(hidden: Tensor, denom: Tensor) -> Tensor:
    """What the forward multiplies gradients by, see `saved_dtype`."""
    return torch.ones_like(denom) if hidden.dtype == torch.float16 else 1 / denom


def blanks(hidden: Tensor, weight: Tensor, dtype: torch.dtype, wanted: list[bool]) -> list[Tensor]:
    """Uninitialised gradients of hidden, weight and bias, empty where they are not wanted."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (dtype, saved_dtype(weight), saved_dtype(weight))
    return [
        hidden.new_empty(shape if yes else 0, dtype=d)
        for shape, yes, d in zip(shapes, wanted, dtypes)
    ]


def register(op: Any, places: Places) -> None:
    """Gives a custom operation its backward."""

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
        # Not saved tensors: the first backward multiplies them in place, as a second dW of 1 GB at
        # 128256 x 4096 is more than the workspace. Weak references tell whether anybody else can
        # see them; the public functions drop them.
        found = output[places.gradients :]
        ctx.gradients = [x.detach() for x in found]
        ctx.seen = [weakref.ref(x) for x in found]
        ctx.set_materialize_grads(False)

    def backward(ctx, g_loss, *_):
        inputs = [
            number if tensor is None else tensor
            for tensor, number in zip(ctx.saved_tensors, ctx.numbers)
        ]
        if g_loss is None:
            return (None,) * len(inputs)
        hidden, weight, bias = *inputs[:2], inputs[places.bias]
        backend, wanted = inputs[places.backend], inputs[places.wanted]
        gradients, ctx.gradients = ctx.gradients, None
        in_place = all(ref() is None for ref in ctx.seen)
        if gradients is None:  # retain_graph: they were handed out, and are computed again
            gradients, in_place = op(*inputs)[places.gradients :], True
        factor = g_loss / inputs[places.denom] if hidden.dtype == torch.float16 else g_loss
        once = torch.is_grad_enabled()  # create_graph: somebody may differentiate what leaves here
        out: list[Tensor | None] = [None] * len(inputs)
        at = (0, 1, places.bias)
        for i, x, gradient, yes in zip(at, (hidden, weight, bias), gradients, wanted):
            if yes:
                gradient = scaled(gradient, factor, x.dtype, in_place, backend)
                out[i] = Once.apply(gradient, x) if once else gradient
        return tuple(out)

    op.register_autograd(backward, setup_context=setup)


class Once(torch.autograd.Function):
    """A gradient of x as it is. It was formed in the forward, so nothing leads from it back to x,
    and a penalty on it would have no gradient without a word: it raises."""

    @staticmethod
    def forward(ctx, gradient, x):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "the gradients of this loss were formed in its forward and cannot be differentiated "
            "again; for a penalty on them take the function of its name in gikernels.reference"
        )


def scaled(
    gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool, backend: str
) -> Tensor:
    """gradient * factor, rounded once; in place where allowed and of the same precision."""
    # What torch.compile traces is no plain tensor; there the compiler decides what is in place.
    in_place = in_place and gradient.dtype == dtype and type(gradient) is Tensor
    if in_place and backend == "triton":
        from gikernels.vocabulary import formed_triton

        return formed_triton.scale_(gradient, factor)
    if in_place and gradient.device.type == "cpu":  # where nobody waits for the number
        # It is not rounded to 16 bits first. Most often it is 1, and dW is not read once more.
        number = factor.item()
        return gradient if number == 1 else gradient.mul_(number)
    # One dimension more than a number has, so that an fp32 factor is not rounded to bf16 first.
    factor = factor.reshape((1,) * gradient.dim())
    if in_place:
        # PyTorch would make fp32 copies of all of a 16-bit gradient, which at a vocabulary of
        # 151936 took more time and memory than the loss.
        step = max(1, BLOCK // max(1, gradient[:1].numel()))
        for block in gradient.split(step) if gradient.dtype != factor.dtype else (gradient,):
            torch.mul(block, factor, out=block)
        return gradient
    return (gradient * factor).to(dtype)
