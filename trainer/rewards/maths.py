"""Whether an answer's number or formula is the right one.

`numbers` is exact: the last number of each text as a fraction (1,000 = 1e3 = 1000.00; 1/2 = 0.5).
math-verify reads formulas, too. It may take forever over one, so it works in a process of its own,
on whose main thread its clock can interrupt it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from typing import Any

from trainer.config.rewards import MathReward
from trainer.rewards.rules import Row, RowError, Rule, column

NUMBER = re.compile(
    r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?(?![\d])"
)
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
BOXED = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
FRACTION = re.compile(r"\\d?frac\{(-?\d+)\}\{(\d+)\}")


def method(settings: MathReward) -> str:
    """What `auto` has chosen."""
    installed = importlib.util.find_spec("math_verify") is not None
    if settings.method == "auto":
        return "math-verify" if installed else "numbers"
    if settings.method == "math-verify" and not installed:
        raise ImportError("math-verify is not installed: pip install math-verify")
    return settings.method


def math(settings: MathReward) -> Rule:
    right = verifier(settings) if method(settings) == "math-verify" else same_numbers

    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        wanted = [str(column(rows, settings.answer, i)) for i in range(len(answers))]
        for i, text in enumerate(wanted):
            if method(settings) == "numbers" and number(text) is None:
                raise RowError(f"{settings.answer} is {text!r}; want a number", i)
        return [float(each) for each in right(answers, wanted)]

    return score


def same_numbers(answers: list[str], wanted: list[str]) -> list[bool]:
    return [number(a) is not None and number(a) == number(w) for a, w in zip(answers, wanted)]


def number(text: str) -> Fraction | None:
    """The number that a text ends on: that in its last \\boxed{}, or behind its last ####, or else
    the last there is."""
    boxed = BOXED.findall(text)
    part = boxed[-1] if boxed else text.rpartition("####")[2]
    part = FRACTION.sub(r"\1/\2", part.replace("\\!", "").replace("$", ""))
    for found in reversed(NUMBER.findall(part)):
        whole, _, below = found.replace(" ", "").partition("/")
        if "," in whole:  # 1,000 is one number; in 1,2 the comma separates
            whole = whole.replace(",", "") if GROUPED.fullmatch(whole) else whole.split(",")[-1]
        if not whole or (below and int(below) == 0):
            continue
        return Fraction(whole) / int(below or 1)
    return None


def verifier(settings: MathReward) -> Any:
    """Compares in one child process, which lives as long as the reward."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def right(answers: list[str], wanted: list[str]) -> list[bool]:
        longest = 60 + 3 * len(answers) * settings.timeout  # it has a clock; this is the second one
        return pool.submit(verified, answers, wanted, settings.timeout).result(longest)

    return right


def verified(answers: list[str], wanted: list[str], timeout: float) -> list[bool]:
    """Of the child: its main thread runs this, as math-verify's clock asks for."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    seconds = max(1, round(timeout))

    def read(text: str) -> Any:
        return parse(text, parsing_timeout=seconds)

    out = []
    for answer, right in zip(answers, wanted):
        gold = read(right if "$" in right or "\\" in right else f"${right}$")
        out.append(bool(verify(gold, read(answer), timeout_seconds=seconds)))
    return out
