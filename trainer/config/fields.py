"""What every section is made of: the error that names a key, and the check that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """One line: where it was said (file:line or override), which key, what is wrong."""

    for_user = True

    def __init__(self, problem: str, key: str = "", where: str = ""):
        self.problem, self.key, self.where = problem, key, where
        super().__init__(": ".join(part for part in (where, key, problem) if part))


def want(holds: bool, key: str, got: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"is {got!r}; want {wanted}", key)


def choices(value: Any, allowed: Sequence[str]) -> str:
    return f"one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def check_training(section: str, config: Any) -> None:
    """What the three stages that train have in common."""
    want(config.steps >= 0, f"{section}.steps", config.steps, "0 or more")
    want(config.lr > 0, f"{section}.lr", config.lr, "more than 0")
    want(config.warmup >= 0, f"{section}.warmup", config.warmup, "0 or more")
    want(config.weight_decay >= 0, f"{section}.weight_decay", config.weight_decay, "0 or more")
    want(config.grad_clip > 0, f"{section}.grad_clip", config.grad_clip, "more than 0")
