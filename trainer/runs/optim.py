"""AdamW with a warm-up, gradient clipping, and decay on matrices only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer import parallel
from trainer.config import Ppo, Rm, Sft, Trainer
from trainer.runs.adam import LeanAdamW
from trainer.runs.faults import Guard


class Optimizer:
    """The learning rate is a function of the step alone, so there is no scheduler to save."""

    def __init__(
        self,
        groups: list[tuple[float, Iterable[nn.Parameter]]],  # learning rate, parameters
        *,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        warmup: int = 0,
        decay_until: int = 0,  # cosine to a tenth at this step; 0: constant
        guard: Guard | None = None,
        name: str = "",  # what the guard calls it
        trainer: Trainer | None = None,  # with 8 bits, or bfloat16 masters
    ) -> None:
        options: list[dict[str, Any]] = []
        for lr, params in groups:
            params = [p for p in params if p.requires_grad]
            matrices = [p for p in params if p.dim() > 1]
            others = [p for p in params if p.dim() <= 1]
            options.append({"params": matrices, "peak": lr, "weight_decay": weight_decay})
            options.append({"params": others, "peak": lr, "weight_decay": 0.0})
        options = [each for each in options if each["params"]]
        self.params = [p for each in options for p in each["params"]]
        self.adamw = adamw(options, trainer, name)
        self.guard, self.name = guard or Guard(limit=1), name
        self.grad_clip, self.warmup, self.decay_until = grad_clip, warmup, decay_until

    @classmethod
    def of(
        cls,
        settings: Sft | Rm | Ppo,
        groups: list[tuple[float, Iterable[nn.Parameter]]],
        guard: Guard,
        name: str,
        trainer: Trainer,
        decay_until: int = 0,
    ) -> Optimizer:
        """With a stage's decay, clipping and warm-up."""
        return cls(
            groups,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
            warmup=settings.warmup,
            decay_until=decay_until,
            guard=guard,
            name=name,
            trainer=trainer,
        )

    def step(self, step: int, loss: Tensor | None = None) -> Tensor:
        """Clip, update, forget the gradients; returns the gradient's norm before clipping.

        A loss (this rank's part) or a gradient that is not finite leaves the weights as they are.
        """
        parallel.sum_gradients(self.params)
        norm = nn.utils.clip_grad_norm_(self.params, self.grad_clip or float("inf"))
        norm = parallel.whole(norm)
        if self.guard.allows(self.name, loss=loss, gradient=norm):
            for each in self.adamw.param_groups:
                each["lr"] = each["peak"] * self.factor(step)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if not self.decay_until:
            return rise
        done = min(1.0, step / self.decay_until)
        return rise * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)

    def materialise(self) -> None:
        """Make the moments and steps that AdamW makes at its first step, as zeros: whoever takes
        what is left of the memory before then finds only what will stay left."""
        for p in self.params:
            if p not in self.adamw.state:
                self.adamw.state[p] = fresh_state(self.adamw, p)

    def state_dict(self) -> dict:
        """AdamW's moments and steps, by the parameters' order; shared with it, so that a checkpoint
        is read in place."""
        self.materialise()
        return {str(i): self.adamw.state[p] for i, p in enumerate(self.params)}

    def load_state_dict(self, state: dict) -> None:
        for i, p in enumerate(self.params):
            self.adamw.state[p] = state[str(i)]


def adamw(
    options: list[dict[str, Any]], trainer: Trainer | None, name: str
) -> torch.optim.Optimizer:
    """torch's, or the lean one where the settings ask for less memory."""
    betas, eps = (0.9, 0.95), 1e-8
    eight_bits = trainer is not None and trainer.optimizer == "adamw8bit"
    if eight_bits or (trainer is not None and trainer.masters == "bfloat16"):
        return LeanAdamW(options, betas, eps, eight_bits, name)
    return torch.optim.AdamW(options, lr=0.0, betas=betas, eps=eps, fused=True)


def fresh_state(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(optimizer, LeanAdamW):
        return optimizer.fresh_state(p)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parallel.local(p).device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }
