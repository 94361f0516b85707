"""One shape of one op, as it is measured: inputs, contenders, and the work that there is to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ops.peers import Contender, Inputs, Outputs

Shape = dict[str, int]

# What the work of a second is printed as.
UNITS = {"FLOP": ("TFLOP/s", 1e12), "B": ("GB/s", 1e9), "value": ("Mvalue/s", 1e6)}
FORWARD, BOTH = "forward", "forward + backward"


class Work(NamedTuple):
    """What a mode of a case has to do, and a bare loop of it to compare with in the same run."""

    amount: float
    unit: str  # of UNITS
    formula: str
    baseline_name: str
    baseline: Callable[[Inputs], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape
    dtype: torch.dtype
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    specification: Callable[[Inputs], Outputs]  # run in float64
    leaves: tuple[str, ...]  # inputs that get a gradient
    contenders: tuple[Contender, ...]
    work: dict[str, Work]  # by mode
    check_shape: Shape  # errors are measured there: float64 of the whole might not fit
    # Of a head: its outputs from inputs, log-probabilities and entropies. With it errors can be
    # measured at the full size, in parts (truth.py).
    finish: Callable[[Inputs, Tensor, Tensor], Outputs] | None = None

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {sizes} {str(self.dtype).removeprefix('torch.')}"

    def contender(self, name: str) -> Contender:
        return next(c for c in self.contenders if c.name == name)


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def copied(size: float, formula: str) -> Work:
    """So many bytes, read and written; the baseline is a plain copy of as many in all."""

    def build(inputs: Inputs) -> Callable[[], Any]:
        device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        source = torch.zeros(max(1, int(size) // 8), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Work(size, "B", formula, "copy", build)
