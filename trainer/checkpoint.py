"""All that a stage's future depends on, in one place.

A stage puts everything that changes while it trains into one `TrainState`; what is not in it is a
pure function of the configuration and the step (data order, randomness, learning rates). So a
checkpoint is this object's state_dict(), whole.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


class TrainState:
    def __init__(
        self,
        models: dict[str, nn.Module | None],
        optimizers: dict[str, Stateful | None],
        others: dict[str, Stateful | None] | None = None,
    ) -> None:
        self.step = 0  # steps that are done
        self.parts: dict[str, Stateful] = {}
        for kind, members in (("model", models), ("optimizer", optimizers), ("", others or {})):
            for name, part in members.items():
                if part is not None:
                    self.parts[f"{kind}.{name}" if kind else name] = part

    def state_dict(self) -> dict:
        return {"step": self.step, **{k: part.state_dict() for k, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        if missing := sorted(self.parts.keys() ^ (state.keys() - {"step"})):
            raise ValueError(f"checkpoint: it and this configuration differ in {missing}")
        self.step = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
