"""The meta step of MetaRM: a detour of the parameters, from which only gradients come back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gikernels.backends import checks


def meta_ascent(
    params: Iterable[Tensor],  # parameters; .grad holds grad J, or None: not moved
    lr: float,
    *,
    normalise: bool = False,
) -> AbstractContextManager[None]:
    """theta' = theta + lr * grad J inside the block, theta outside (MetaRM).

        difference_objective(model(samples)).backward()
        with meta_ascent(model.parameters(), 5e-6):          # .grad is used up: None inside
            preference_loss(model(w), model(l)).backward()   # the gradient at theta'
        optimizer.step()                                     # applied at theta

    `normalise` divides grad J by its norm over all parameters together, over all ranks where they
    are sharded (DTensor); a zero gradient then moves nothing. theta comes back bit for bit, in the
    same storage, whatever happens inside. It costs one copy of the parameters that move. The step
    is taken in the parameters' own precision: 5e-6 is below the resolution of bf16 weights, so
    give it fp32 masters.
    """
    if isinstance(params, Tensor):
        raise checks.wrong("params", params, "an iterable of parameters, as model.parameters()")
    params = list(params)
    for p in params:
        if not isinstance(p, Tensor):
            raise checks.wrong("params", p, "an iterable of parameters, as model.parameters()")
    checks.number("lr", lr)
    distinct = {id(p): p for p in params}  # a tied parameter moves once
    return _ascent(list(distinct.values()), lr, normalise)


@contextmanager
def _ascent(params: list[Tensor], lr: float, normalise: bool) -> Iterator[None]:
    moved = [(p, p.grad) for p in params if p.grad is not None]
    with torch.no_grad():
        thetas = [_shard(p) for p, _ in moved]
        grads = [_shard(grad) for _, grad in moved]
        kept = [theta.clone() for theta in thetas]
        norm = _norm([grad for _, grad in moved]) if normalise else 1.0
    try:
        with torch.no_grad():
            if moved and norm != 0:
                torch._foreach_add_(thetas, grads, alpha=lr / norm)
        for p, _ in moved:
            p.grad = None
        del grads, moved
        yield
    finally:
        if thetas:
            with torch.no_grad():
                torch._foreach_copy_(thetas, kept)


def _shard(x: Tensor) -> Tensor:
    """What this rank has of a DTensor, in the same storage: a step needs no more."""
    return x.to_local() if hasattr(x, "to_local") else x.detach()


def _norm(grads: list[Tensor]) -> float:
    """Over all of them together, in float64: the square of 1e-25 is 0 in float32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]
    # The norm of a DTensor is one too, of a sum over ranks that is still to be taken.
    whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    return math.hypot(*(float(n) for n in whole))
