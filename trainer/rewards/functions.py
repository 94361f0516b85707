"""A reward function is any `package.module:function`, called with texts and checked:

    def concise(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
        return [-len(answer) / 100 for answer in answers]

`meta` has what else the prompt's data row holds. It returns one finite number for each answer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from trainer.batch.types import Prompt
from trainer.config import Config


class RewardError(ValueError):
    """One line: which reward function, and what it did."""

    for_user = True


class RewardFunction:
    """A user's function, called with texts and checked."""

    def __init__(self, place: str, key: str) -> None:
        self.place, self.key = place, key
        module, _, name = place.partition(":")
        if str(Path.cwd()) not in sys.path:  # a file beside the config, as `python -m` would find
            sys.path.insert(0, str(Path.cwd()))
        try:
            with _here():
                target = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
        except Exception as error:
            raise RewardError(f"{key}: cannot import {place}: {_one_line(error)}") from error
        if not callable(target):
            raise RewardError(f"{key}: {place} is a {type(target).__name__}, want a function")
        self.function: Callable = target

    def __call__(self, prompts: list[str], answers: list[str], meta: list[dict]) -> Tensor:
        try:
            with _here():
                scores = self.function(prompts, answers, meta)
        except Exception as error:
            raise RewardError(f"{self.key}: {self.place} raised {_one_line(error)}") from error
        want = f"want {len(answers)} numbers, one for each answer"
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"{self.key}: {self.place} returned {type(scores).__name__}, {want}: "
                f"{_one_line(error)}"
            ) from error
        if scores.shape != (len(answers),):
            raise RewardError(
                f"{self.key}: {self.place} returned shape {tuple(scores.shape)}, {want}"
            )
        return scores


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """A function may change the folder it works in; the run's paths start from this one."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_functions(config: Config) -> dict[str, tuple[RewardFunction, float]]:
    """name -> (function, weight)."""
    return {
        each.label: (RewardFunction(each.function, f"reward.functions[{i}]"), each.weight)
        for i, each in enumerate(config.reward.functions)
    }


def check_functions(config: Config, prompts: list[Prompt]) -> None:
    """Call every reward function once, on prompts and an empty answer, before a run begins."""
    some = prompts[:2]
    for function, _ in load_functions(config).values():
        scores = function([p.text for p in some], [""] * len(some), [p.meta for p in some])
        if not torch.isfinite(scores).all():  # later on, the guard skips such a step
            first = int((~torch.isfinite(scores)).nonzero()[0])
            raise RewardError(
                f"{function.key}: {function.place} returned {scores[first]} for {first}"
            )
