"""Rewards by rule: a program says what an answer is worth, from its text and the prompt's row.

Each is made of its settings and is then a reward function like any other. Scores are 0 to 1, but
for length's, which are 0 to -1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trainer.config.rewards import (
    ChoiceReward,
    ContainsReward,
    LengthReward,
    RegexReward,
    VerifierReward,
)
from trainer.worlds import reasoning

Row = dict[str, Any]
Rule = Callable[[list[str], list[str], list[Row]], list[float]]


class RowError(ValueError):
    """What a row lacks; `row` is its place in the batch."""

    def __init__(self, problem: str, row: int) -> None:
        self.row = row
        super().__init__(problem)


def column(rows: list[Row], name: str, row: int) -> Any:
    value = rows[row].get(name)
    if value is None:
        there = ", ".join(map(str, rows[row])) or "none"
        raise RowError(f"the row has no column {name}; there are {there}", row)
    return value


def verifier(settings: VerifierReward) -> Rule:
    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        return [
            reasoning.verdict(column(rows, "task", i), answer) for i, answer in enumerate(answers)
        ]

    return score


def regex(settings: RegexReward) -> Rule:
    pattern = re.compile(settings.pattern)
    find = pattern.fullmatch if settings.whole else pattern.search

    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        return [float(find(answer) is not None) for answer in answers]

    return score


def contains(settings: ContainsReward) -> Rule:
    def fold(text: str) -> str:
        return text.casefold() if settings.ignore_case else text

    def wanted(rows: list[Row], row: int) -> list[str]:
        if not settings.column:
            return list(settings.texts)
        value = column(rows, settings.column, row)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise RowError(f"{settings.column} is {value!r}; want a text, or a list of them", row)
        return texts

    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        out = []
        for i, answer in enumerate(map(fold, answers)):
            texts = wanted(rows, i)
            out.append(sum(fold(text) in answer for text in texts) / len(texts))
        return out

    return score


def length(settings: LengthReward) -> Rule:
    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        words = settings.unit == "words"
        counts = [len(answer.split()) if words else len(answer) for answer in answers]
        most = settings.most or max(counts, default=0)
        outside = [max(settings.least - n, n - most, 0) for n in counts]
        return [-min(1.0, over / settings.slack) for over in outside]

    return score


def choice(settings: ChoiceReward) -> Rule:
    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        return [
            float(chosen(answer, settings.letters) == _right(rows, i, settings))
            for i, answer in enumerate(answers)
        ]

    return score


def chosen(answer: str, letters: str) -> str | None:
    """The letter that an answer settles on, the last where it says several; None where it says
    none. What it calls its answer goes before a letter in brackets, and that before a bare one."""
    some = f"[{letters}]"
    for pattern in (
        rf"\\boxed\{{\s*(?:\\text\{{)?\(?({some})\)?\}}?\s*\}}",
        rf"(?i:answer|choice|option)(?i:\s+is)?\s*[:=]?\s*\**\(?({some})\)?(?!\w)",
        rf"\(({some})\)",
        rf"(?<![\w']){some}(?![\w'])",
    ):
        found = re.findall(pattern, answer)
        if found:
            return found[-1]
    return None


def _right(rows: list[Row], row: int, settings: ChoiceReward) -> str:
    value, letters = column(rows, settings.answer, row), settings.letters
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    if isinstance(value, str) and len(value.strip(" ().")) == 1 and value.strip(" ().") in letters:
        return value.strip(" ().")
    wanted = f"one of {letters}, or 0 to {len(letters) - 1}"
    raise RowError(f"{settings.answer} is {value!r}; want {wanted}", row)
