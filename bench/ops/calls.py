"""One call of a contender, forward or with gradients, and its errors against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops.case import BOTH, Case, Shape
from bench.ops.peers import Contender, Inputs, Outputs

EPS = 1e-6  # of the largest true value: what fp32 statistics owe nobody


def upstream(outputs: Outputs) -> list[Tensor]:
    """Fixed upstream gradients: the same for everybody who computes an output of this name."""
    grads = []
    for name, x in outputs.items():
        rng = torch.Generator().manual_seed(sum(map(ord, name)))
        grads.append(
            torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)
            if x.dim()
            else x.new_ones(())
        )
    return grads  # fmt: skip


def with_leaves(case: Case, inputs: Inputs) -> Inputs:
    """The same tensors, those that get a gradient as leaves of a graph of their own."""
    return inputs | {name: inputs[name].detach().requires_grad_() for name in case.leaves}


def runner(case: Case, contender: Contender, inputs: Inputs, mode: str) -> Callable[[], Any]:
    """One call of the mode; the gradients of the loss go to the leaves and are thrown away."""
    if mode != BOTH:

        def forward() -> Outputs:
            with torch.no_grad():
                return contender.run(inputs)

        return forward
    own = with_leaves(case, inputs)
    leaves = [own[name] for name in case.leaves]
    grads: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        outputs = contender.run(own)
        if not grads:
            grads.extend(upstream(outputs))
        return torch.autograd.grad(list(outputs.values()), leaves, grads)

    return both


def prepare(
    case: Case, contender: Contender, shape: Shape, device: torch.device, mode: str
) -> Callable[[], Any]:
    return runner(case, contender, case.inputs(shape, case.dtype, device), mode)


# --- errors -------------------------------------------------------------------------------------


def values_and_gradients(
    case: Case,
    run: Callable[[Inputs], Outputs],
    inputs: Inputs,
    only: tuple[str, ...] | None = None,
) -> Outputs:
    """What run returns, and "d leaf" for the gradient of all of it."""
    own = with_leaves(case, inputs)
    outputs = {name: x for name, x in run(own).items() if only is None or name in only}
    found = {name: x.detach() for name, x in outputs.items()}
    differentiable = {name: x for name, x in outputs.items() if x.requires_grad}
    if case.leaves and differentiable:
        leaves = [own[name] for name in case.leaves]
        gradients = torch.autograd.grad(
            list(differentiable.values()), leaves, upstream(differentiable), allow_unused=True
        )
        found |= {f"d {name}": g for name, g in zip(case.leaves, gradients) if g is not None}
    return found


def errors(case: Case, contender: Contender, device: torch.device) -> dict[str, float]:
    """Largest error of each output and gradient, in units of the largest true value."""
    inputs = case.inputs(case.check_shape, case.dtype, device)
    found = values_and_gradients(case, contender.run, inputs)
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    truth = values_and_gradients(case, case.specification, exact, tuple(found))
    return {
        name: ((x.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
        for name, x in found.items()
    }


def within_bound(own: dict[str, float], plain: dict[str, float]) -> bool:
    """At most twice the error of same-dtype plain PyTorch, plus eps; NaN is not within."""
    return all(error <= 2 * plain.get(name, 0) + EPS for name, error in own.items())
