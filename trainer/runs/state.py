"""All that a stage's future depends on, as tensors by name: what a checkpoint holds.

Everything is a tensor, the numbers and the random generators too. A checkpoint may come from
somebody else, and whatever is no tensor would be a pickle, which runs what its writer wants.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainer import parallel

ABSURD = 1e6
"""No weight of a language model that works is as large."""


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


class TrainState:
    """state_dict() shares its tensors with the parts, and is loaded in place."""

    def __init__(
        self,
        models: dict[str, nn.Module | None],
        optimizers: dict[str, Stateful | None],
        others: dict[str, Stateful | None] | None = None,
        base: tuple[str, str] | None = None,
        adapters: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Of a model on a frozen `base` (name and fingerprint) `adapters` has the weights that are
        kept: those that are trained."""
        self.base, self.adapters = base, adapters or {}
        self.step = 0  # steps that are done
        self.models = {name: model for name, model in models.items() if model is not None}
        self.parts: dict[str, Stateful] = {}
        for kind, members in (("optimizer", optimizers), ("", others or {})):
            for name, part in members.items():
                if part is not None:
                    self.parts[f"{kind}.{name}" if kind else name] = part

    def state_dict(self) -> dict:
        weights = {f"model.{name}": self._weights(name) for name in self.models}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"step": self.step, **weights, **parts}

    def load_state_dict(self, state: dict) -> None:
        """Weights are in place already; see `state_dict`."""
        self.step = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def is_finite(self) -> bool:
        """On every rank, of every weight, and none is absurd."""
        return parallel.all_true(not self.ran_away())

    def ran_away(self) -> bool:
        """On this rank, without asking the others: a weight is not finite, or absurd."""
        weights = [w for name in self.models for w in self._weights(name).values()]
        local = [parallel.local(w) for w in weights if w.is_floating_point()]
        return not all(bool((w.abs() < ABSURD).all()) for w in local)

    def _weights(self, name: str) -> dict[str, Tensor]:
        """By name, tied ones once. Buffers that are not saved are functions of the
        configuration."""
        if name in self.adapters:
            return self.adapters[name]
        model = self.models[name]
        saved = model.state_dict(keep_vars=True)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return weights | {name: b for name, b in model.named_buffers() if name in saved}


class RandomStates:
    """Python's, NumPy's and torch's global generators on this rank."""

    def seed(self, *names: object) -> None:
        seed = parallel.generator(*names, parallel.rank()).initial_seed()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def state_dict(self) -> dict:
        _, words, gauss = random.getstate()
        _, keys, place, has_gauss, cached = np.random.get_state()
        states = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
            "numpy": torch.tensor([*map(int, keys), place, has_gauss], dtype=torch.int64),
            "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {f"rank_{parallel.rank()}": states}

    def load_state_dict(self, state: dict) -> None:
        states = state[f"rank_{parallel.rank()}"]
        gauss = float(states["python_gauss"])
        words = tuple(states["python"].tolist())
        random.setstate((3, words, None if math.isnan(gauss) else gauss))
        *keys, place, has_gauss = states["numpy"].tolist()
        keys = np.array(keys, dtype=np.uint32)
        np.random.set_state(("MT19937", keys, place, has_gauss, float(states["numpy_gauss"])))
        torch.set_rng_state(states["torch"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def flat(state: Mapping[str, Any], above: str = "") -> dict[str, Tensor]:
    """{"a": {"b": x}} -> {"a/b": x}, numbers as tensors of their own."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = f"{above}/{name}" if above else name
        if isinstance(value, dict):
            out.update(flat(value, inner))
        else:
            out[inner] = value if isinstance(value, Tensor) else _number(value, inner)
    return out


def _number(value: object, name: str) -> Tensor:
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64}
    assert type(value) in kinds, f"{name}: a state is of tensors and numbers, not {type(value)}"
    return torch.tensor(value, dtype=kinds[type(value)])


def filled(state: Mapping[str, Any], flat: Mapping[str, Tensor], above: str = "") -> dict:
    """The nested `state` with the values of `flat`; a number is one again."""
    out: dict[str, Any] = {}
    for name, value in state.items():
        inner = f"{above}/{name}" if above else name
        if isinstance(value, dict):
            out[name] = filled(value, flat, inner)
        else:
            out[name] = flat[inner] if isinstance(value, Tensor) else flat[inner].item()
    return out
