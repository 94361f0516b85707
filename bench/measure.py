"""One case: everybody's error against float64, then times of one interleaved run, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import memory, timing
from bench.cases import BOTH, UNITS, Case, Shape
from bench.peers import Contender, Inputs, Outputs

EPS = 1e-6  # of the largest true value: what fp32 statistics owe nobody


def _grads(outputs: Outputs) -> list[Tensor]:
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
            grads.extend(_grads(outputs))
        return torch.autograd.grad(list(outputs.values()), leaves, grads)

    return both


def prepare(
    case: Case, contender: Contender, shape: Shape, device: torch.device, mode: str
) -> Callable[[], Any]:
    return runner(case, contender, case.inputs(shape, case.dtype, device), mode)


# --- errors -------------------------------------------------------------------------------------


def _values_and_gradients(
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
            list(differentiable.values()), leaves, _grads(differentiable), allow_unused=True
        )
        found |= {f"d {name}": g for name, g in zip(case.leaves, gradients) if g is not None}
    return found


def errors(case: Case, contender: Contender, device: torch.device) -> dict[str, float]:
    """Largest error of each output and gradient, in units of the largest true value."""
    inputs = case.inputs(case.check_shape, case.dtype, device)
    found = _values_and_gradients(case, contender.run, inputs)
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    truth = _values_and_gradients(case, case.specification, exact, tuple(found))
    return {
        name: ((x.double() - truth[name]).abs().max() / truth[name].abs().max()).item()
        for name, x in found.items()
    }


def within_bound(own: dict[str, float], plain: dict[str, float]) -> bool:
    """At most twice the error of same-dtype plain PyTorch, plus eps; NaN is not within."""
    return all(error <= 2 * plain.get(name, 0) + EPS for name, error in own.items())


# --- the whole case -----------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return "out of memory"
    first = str(error).strip().split("\n")[0]
    return first if type(error).__name__ == "Absent" else f"{type(error).__name__}: {first}"[:300]


def measure(
    case: Case,
    where: tuple[str, int],  # size and index, for the memory of a process of its own
    device: torch.device,
    seconds: float,
    say: Callable[[str], None] = print,
) -> tuple[list[dict], list[dict]]:
    """Rows of figures, and who is absent and why."""
    rows: list[dict] = []
    absent: list[dict] = []

    def miss(contender: Contender, where: str, error: Exception) -> None:
        absent.append({"case": where, "contender": contender.name, "reason": _reason(error)})

    found: dict[str, dict[str, float]] = {}
    for contender in case.contenders:
        try:
            found[contender.name] = errors(case, contender, device)
        except Exception as error:
            miss(contender, case.label, error)
    inputs = case.inputs(case.shape, case.dtype, device)
    for mode, work in case.work.items():
        runners = {}
        for contender in case.contenders:
            if contender.name not in found or (mode == BOTH and contender.forward_only):
                continue
            fn = runner(case, contender, inputs, mode)
            try:
                fn()  # compiles, and shows who runs out of memory
                runners[contender.name] = fn
            except Exception as error:
                miss(contender, f"{case.label}, {mode}", error)
        baseline = work.baseline(inputs)
        baseline()
        everybody = {**runners, work.baseline_name: baseline}
        times = timing.interleaved(everybody, device, seconds=seconds)
        best = work.amount / times[work.baseline_name].median
        unit, scale = UNITS[work.unit]
        for name, t in times.items():
            rate = work.amount / t.median
            row = {
                "op": case.op,
                "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "mode": mode,
                "contender": name,
                "median_ms": 1e3 * t.median,
                "p20_ms": 1e3 * t.low,
                "p80_ms": 1e3 * t.high,
                "calls": t.calls,
                "rate": rate / scale,
                "unit": unit,
                "formula": work.formula,
                "fraction": rate / best,
                "fraction_of": work.baseline_name,
                "peak_extra_bytes": None,
                "memory_method": None,
                "errors": {},
                "within_bound": None,
                "lacks": "",
            }
            if name in runners:
                size, method = _peak(case, where, name, mode, runners[name], device)
                row |= {
                    "peak_extra_bytes": size,
                    "memory_method": method,
                    "errors": found[name],
                    "within_bound": within_bound(found[name], found.get("torch", {})),
                    "lacks": case.contender(name).lacks,
                }
            rows.append(row)
            say(f"  {mode:18} {name:26} {row['median_ms']:10.3f} ms  {row['rate']:9.4g} {unit}")
    return rows, absent


def _peak(
    case: Case,
    where: tuple[str, int],
    name: str,
    mode: str,
    fn: Callable[[], Any],
    device: torch.device,
) -> tuple[int | None, str]:
    if device.type == "cuda":
        return memory.on_gpu(fn), "CUDA caching allocator"
    size, index = where
    if size == "quick":
        return memory.here(fn) if memory.CLEAR.exists() else None, "resident set, shared process"
    request = {"op": case.op, "size": size, "index": index, "contender": name, "mode": mode}
    request["threads"] = torch.get_num_threads()
    return memory.in_own_process(request), "resident set, own process"
