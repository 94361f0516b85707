"""Reward functions: one by name, or any `package.module:function`, called with texts and checked:

    def concise(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
        return [-len(answer) / 100 for answer in answers]

`meta` has what else the prompt's data row holds. It returns one finite number for each answer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.config.rewards import MathReward
from trainer.config.rewards import RewardFunction as Entry
from trainer.rewards import maths, remote, rules
from trainer.rewards.errors import RewardError, at, one_line

BUILT_IN: dict[str, Callable[..., rules.Rule]] = {
    "choice": rules.choice,
    "contains": rules.contains,
    "length": rules.length,
    "math": maths.math,
    "regex": rules.regex,
    "verifier": rules.verifier,
    **remote.REMOTE,
}


class RewardFunction:
    """One entry of reward.functions, ready to be called; what it does wrong is one line."""

    def __init__(self, entry: Entry, key: str) -> None:
        self.entry, self.key, self.place = entry, key, entry.function
        try:
            with _here():
                built_in = BUILT_IN.get(self.place)
                self.function = built_in(entry) if built_in else _imported(self.place)
        except Exception as error:
            raise RewardError(f"{key}: cannot import {self.place}: {one_line(error)}") from error
        if not callable(self.function):
            kind = type(self.function).__name__
            raise RewardError(f"{key}: {self.place} is a {kind}, want a function")

    def __call__(self, prompts: list[str], answers: list[str], meta: list[dict]) -> Tensor:
        try:
            with _here():
                scores = self.function(prompts, answers, meta)
        except (Exception, SystemExit) as error:  # sys.exit() in a reward is no way to end a run
            if isinstance(error, RewardError):
                raise RewardError(f"{self.key}: {self.place}: {error}") from error
            where = self._where(error, prompts, answers, meta)
            raise RewardError(
                f"{self.key}: {self.place} raised {one_line(error)}; {where}"
            ) from error
        want = f"want {len(answers)} numbers, one for each answer"
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"{self.key}: {self.place} returned {type(scores).__name__}, {want}: "
                f"{one_line(error)}"
            ) from error
        if scores.shape != (len(answers),):
            raise RewardError(
                f"{self.key}: {self.place} returned shape {tuple(scores.shape)}, {want}"
            )
        return scores

    def _where(
        self, error: BaseException, prompts: list[str], answers: list[str], meta: list[dict]
    ) -> str:
        """Prompt and answer that it fails at: called with each alone, it says so itself."""
        if isinstance(error, rules.RowError):
            return at(prompts[error.row], answers[error.row])
        for prompt, answer, row in zip(prompts, answers, meta):
            try:
                self.function([prompt], [answer], [row])
            except (Exception, SystemExit) as again:
                if type(again) is type(error):
                    return at(prompt, answer)
        return f"in a batch of {len(answers)}, and of none alone"

    def describe(self) -> str:
        """Where "auto" has chosen something: what."""
        if isinstance(self.entry, MathReward):
            return f"{self.place} by {maths.method(self.entry)}"
        return self.place


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    if str(Path.cwd()) not in sys.path:  # a file beside the config, as `python -m` would find
        sys.path.insert(0, str(Path.cwd()))
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """A function may change the folder it works in; the run's paths start from this one."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)


def load_functions(config: Config) -> dict[str, tuple[RewardFunction, float]]:
    """name -> (function, weight)."""
    return {
        each.label: (RewardFunction(each, f"reward.functions[{i}]"), each.weight)
        for i, each in enumerate(config.reward.functions)
    }


def check_functions(config: Config, prompts: Sequence[Prompt]) -> None:
    """Call every reward function once, on prompts and an empty answer, before a run begins."""
    some = prompts[:2]
    for function, _ in load_functions(config).values():
        scores = function([p.text for p in some], [""] * len(some), [p.meta for p in some])
        if not torch.isfinite(scores).all():  # later on, the guard skips such a step
            first = int((~torch.isfinite(scores)).nonzero()[0])
            raise RewardError(
                f"{function.key}: {function.place} returned {scores[first]} for {first}; "
                f"{at(some[first].text, '')}"
            )
