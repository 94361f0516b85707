"""AdamW that takes less memory: moments of 8 bits, masters in bfloat16, or both.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- (1 - lr decay) w - lr m' / (sqrt(v') + eps)             computed in float32, as ever

Moments are kept as codes with one scale for each BLOCK of a row. A code is the fourth root of the
share of the scale, so that small numbers keep a digit: a step is 3 % of the largest m, and 18 % of
one a thousandth of it; half as much of v, whose codes have no sign. A v above zero never becomes
zero: m would be divided by eps. bfloat16 masters are rounded up or down by chance, in proportion,
so that updates smaller than half a step add up; the numbers depend on seed, step and place alone.

By hand, where torchao has the like: its update is compiled for each shape of weights, and its codes
cannot be read from a checkpoint on another number of ranks. Here codes and scales are sharded as
the weights are, by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer import parallel

BLOCK = 256
PIECE = 1 << 22
"""Numbers that are updated together: what they take for a moment, 4 bytes each, several times."""


class LeanAdamW(torch.optim.Optimizer):
    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        eight_bits: bool,
        name: str,  # of its random numbers
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.betas, self.eps, self.eight_bits, self.name = betas, eps, eight_bits, name

    def fresh_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), device=parallel.local(p).device)}
        for moment, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            if self.eight_bits:
                blocks = -(-_width(p) // BLOCK)
                state[moment] = _like(p, p.shape, dtype)
                state[f"{moment}_scale"] = _like(p, (p.shape[0], blocks), torch.float32)
            else:
                state[moment] = _like(p, p.shape, torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p] = self.fresh_state(p)
                self.state[p]["step"] += 1
                self._update(p, group, number)

    def _update(self, p: nn.Parameter, group: dict[str, Any], number: int) -> None:
        step, (b1, b2) = int(self.state[p]["step"]), self.betas
        drawn = parallel.generator("rounding", self.name, step, number, parallel.rank())
        for w, g, state in self._pieces(p):
            draws = torch.Generator(w.device).manual_seed(
                int(torch.randint(2**62, (), generator=drawn))
            )
            m, v = self._read(state, "exp_avg"), self._read(state, "exp_avg_sq")
            g = g.float()
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            self._write(state, "exp_avg", m)
            self._write(state, "exp_avg_sq", v)
            scale = (v / (1 - b2**step)).sqrt_().add_(self.eps)
            new = w.float() * (1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(m, scale, value=-group["lr"] / (1 - b1**step))
            w.copy_(stochastic(new, draws) if w.dtype == torch.bfloat16 else new)

    def _pieces(self, p: nn.Parameter) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """(rows, width) of weight, gradient and state on this rank, some rows at a time."""
        assert p.grad is not None
        width = _width(p)
        w, g = (parallel.local(x.detach()).reshape(-1, width) for x in (p, p.grad))
        state = {
            name: parallel.local(x).reshape(len(w), -1)
            for name, x in self.state[p].items()
            if name != "step" and len(w)
        }
        rows = max(1, PIECE // width)
        for i in range(0, len(w), rows):
            here = slice(i, i + rows)
            yield w[here], g[here], {name: x[here] for name, x in state.items()}

    def _read(self, state: dict[str, Tensor], moment: str) -> Tensor:
        codes = state[moment]
        if not self.eight_bits:
            return codes
        scale, most = state[f"{moment}_scale"].unsqueeze(2), torch.iinfo(codes.dtype).max
        share = _blocked(codes.float()) / most
        return (share * share.abs().pow(3) * scale).flatten(1)[:, : codes.shape[1]]

    def _write(self, state: dict[str, Tensor], moment: str, x: Tensor) -> None:
        if not self.eight_bits:
            return  # it is the state itself
        blocked = _blocked(x)
        scale = blocked.abs().amax(2, keepdim=True)
        share = blocked / scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes = (share.abs().pow(0.25) * torch.iinfo(state[moment].dtype).max).round_()
        if moment == "exp_avg_sq":
            codes.clamp_(min=1)
        codes.mul_(share.sign())
        state[moment].copy_(codes.flatten(1)[:, : x.shape[1]])
        state[f"{moment}_scale"].copy_(scale.squeeze(2))


def stochastic(x: Tensor, draws: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of its two neighbours, on average to itself."""
    noise = torch.randint(1 << 16, x.shape, generator=draws, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & ~0xFFFF).view(torch.float32).bfloat16()


def _width(p: Tensor) -> int:
    """Of a row: whatever is behind the first dimension, by which weights are sharded."""
    return p.shape[1:].numel()


def _like(p: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, with the shards of `p`."""
    if not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    local = p.to_local()
    mine = torch.zeros(len(local), *shape[1:], dtype=dtype, device=local.device)
    strides = mine.new_empty(shape, device="meta").stride()
    return DTensor.from_local(
        mine, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def _blocked(x: Tensor) -> Tensor:  # (rows, width) -> (rows, blocks, BLOCK), padded with zeros
    wide = -(-x.shape[1] // BLOCK) * BLOCK
    return nn.functional.pad(x, (0, wide - x.shape[1])).unflatten(1, (-1, BLOCK))
