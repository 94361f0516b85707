"""What an answer scores: the reward model's weight, functions of your own, and those by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.fields import (
    ConfigError,
    Section,
    did_you_mean,
    filled,
    key,
    require,
    such_that,
)

RESERVED = {"total": "the weighted sum", "model": "the reward model's part"}
COLUMN = "a column's name"


@dataclass(frozen=True, kw_only=True)
class RewardFunction(Section, at="reward.functions"):
    function: str = key(
        "",
        "package.module:function, or the name of a built-in one: choice, contains, http, judge, "
        "length, math, regex, verifier.",
        basic=True,
    )
    weight: float = key(1.0, "Its weight in the sum.", basic=True)
    name: str = key("", "Its name in the metrics; empty: the function's.")

    @classmethod
    def kind_of(cls, data: Mapping[str, Any]) -> type[Section]:
        """A named function has options of its own, which its section knows."""
        return NAMED.get(str(data.get("function")), cls)

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]

    def relations(self) -> None:
        own = re.fullmatch(r"[\w.]+:[\w.]+", self.function) is not None
        names = sorted(NAMED)
        self.require(
            own or self.function in names,
            "function",
            f"package.module:function, or one of {', '.join(names)}"
            f"{did_you_mean(self.function, names)}",
        )
        if self.label in RESERVED:
            raise ConfigError(
                f"{self.label!r} is taken: scores call {RESERVED[self.label]} so; want another",
                self._key("name"),
            )


@dataclass(frozen=True, kw_only=True)
class MathReward(RewardFunction):
    """1 where the answer's last number or formula equals the row's, else 0."""

    answer: str = key("answer", "Column of the right answer.", filled(COLUMN))
    method: Literal["auto", "math-verify", "numbers"] = key(
        "auto",
        "math-verify compares formulas, numbers exact normalised numbers; auto: math-verify where "
        "it is installed. The log says which.",
    )
    timeout: float = key(5.0, "math-verify: seconds for one answer, which else scores 0.", above=0)


@dataclass(frozen=True, kw_only=True)
class ChoiceReward(RewardFunction):
    """1 where the answer settles on the row's letter, else 0."""

    answer: str = key(
        "answer", "Column of the right choice: its letter, or its place from 0.", filled(COLUMN)
    )
    letters: str = key(
        "ABCDE",
        "The letters to choose from.",
        such_that(
            lambda letters: letters.isalpha() and len(set(letters)) == len(letters) > 1,
            "two or more different letters, such as ABCD",
        ),
    )


def _compiles(pattern: Any, at: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"is {pattern!r}: {error}", at) from None


@dataclass(frozen=True, kw_only=True)
class RegexReward(RewardFunction):
    """1 where the pattern is found in the answer, else 0."""

    pattern: str = key(
        "",
        "A regular expression of Python; (?i) in front: whatever the case.",
        filled("a regular expression"),
        _compiles,
    )
    whole: bool = key(False, "It has to match the answer from end to end.")


@dataclass(frozen=True, kw_only=True)
class LengthReward(RewardFunction):
    """0 within the bounds, and beyond them falling along a line to -1."""

    least: int = key(0, "Shortest answer that costs nothing.", low=0)
    most: int = key(0, "Longest answer that costs nothing; 0: no bound.", low=0)
    slack: int = key(100, "So far outside the bounds it costs 1.", low=1)
    unit: Literal["words", "characters"] = key("words", "What is counted.")

    def relations(self) -> None:
        super().relations()
        self.require(
            self.least > 0 or self.most > 0, "most", "1 or more, or least: without, nothing costs"
        )
        self.require(
            self.most == 0 or self.most >= self.least, "most", f"least ({self.least}) or more"
        )


@dataclass(frozen=True, kw_only=True)
class ContainsReward(RewardFunction):
    """The share of the texts that stand in the answer."""

    texts: tuple[str, ...] = key(
        (), "What to look for.", such_that(all, "texts that are not empty")
    )
    column: str = key("", "Or a column that has the text, or a list of them.")
    ignore_case: bool = key(False, "Whatever the case.")

    def relations(self) -> None:
        super().relations()
        self.require(
            bool(self.texts) != bool(self.column), "texts", "some, or a column, one of the two"
        )


def _address(url: Any, at: str) -> None:
    require(re.match(r"https?://[^/]+", url) is not None, at, url, "http://... or https://...")


@dataclass(frozen=True, kw_only=True)
class Remote(RewardFunction):
    url: str = key("", "Its address.", _address)
    timeout: float = key(30.0, "Seconds for one request.", above=0)
    retries: int = key(
        3, "More tries where it does not answer, with a longer wait before each.", low=0
    )
    backoff: float = key(0.5, "Seconds before the second try; then twice as many.", low=0)
    on_error: Literal["stop", "skip"] = key(
        "stop",
        "What follows when all tries have failed; skip: the step is not trained on, as where a "
        "score is not finite (trainer.max_skipped).",
    )
    parallel: int = key(8, "Requests at a time.", low=1)
    token: str = key(
        "", "Name of the environment variable with a bearer token; empty: none is sent."
    )


@dataclass(frozen=True, kw_only=True)
class HttpReward(Remote):
    """POSTs {prompts, answers, meta}, each a list, and reads {scores}."""

    batch: int = key(64, "Answers in one request.", low=1)


@dataclass(frozen=True, kw_only=True)
class JudgeReward(Remote):
    """Asks a chat model for a mark, over an OpenAI-compatible endpoint."""

    model: str = key("", "The model's name there.", filled("a model's name"))
    question: str = key(
        "Rate the answer to the prompt from 0 (useless) to 10 (perfect). Say nothing but the "
        "number.\n\nPrompt:\n{prompt}\n\nAnswer:\n{answer}",
        "What the judge is asked; {prompt}, {answer} and {a column's name} are filled in.",
        such_that(lambda text: "{answer}" in text, "a text with {answer}"),
    )
    pattern: str = key(
        r"-?\d+(?:\.\d+)?",
        "What of its reply is the mark: the last match, or its first group.",
        filled("a regular expression"),
        _compiles,
    )
    lowest: float = key(0.0, "The mark that becomes 0.")
    highest: float = key(10.0, "The mark that becomes 1; what is outside is cut off.")
    max_tokens: int = key(16, "Longest reply.", low=1)

    def relations(self) -> None:
        super().relations()
        self.require(self.lowest < self.highest, "highest", f"more than lowest ({self.lowest:g})")


@dataclass(frozen=True, kw_only=True)
class VerifierReward(RewardFunction):
    """What the exact check of the reasoning world says, 0 to 1."""


NAMED: dict[str, type[RewardFunction]] = {
    "choice": ChoiceReward,
    "contains": ContainsReward,
    "http": HttpReward,
    "judge": JudgeReward,
    "length": LengthReward,
    "math": MathReward,
    "regex": RegexReward,
    "verifier": VerifierReward,
}


@dataclass(frozen=True, kw_only=True)
class Reward(Section, at="reward"):
    functions: tuple[RewardFunction, ...] = key(
        (),
        "Functions that add to the score: a list of {function, weight, name}, and the options of "
        "those by name (gi keys reward.functions).",
        basic=True,
    )
    model_weight: float = key(
        1.0,
        "Weight of the reward model in the sum; 0: functions alone, and no model is loaded.",
        basic=True,
    )
    normalise: Literal["none", "std", "meanstd"] = key(
        "std", "Divide by the running standard deviation, or subtract the running mean as well."
    )
    clip: float = key(
        5.0,
        "Scores are clipped to +- this, after normalising; 0: off.",
        low=0,
        want="0 (off) or more",
    )
    truncated_penalty: float = key(
        0.0, "Taken off the score of an answer that was cut at the length limit.", low=0
    )

    def relations(self) -> None:
        self.require(
            self.model_weight != 0 or len(self.functions) > 0,
            "model_weight",
            "anything but 0 when there is no reward function",
        )
        names = [each.label for each in self.functions]
        once = len(set(names)) == len(names)
        require(once, "reward.functions", names, "a different name for each")
