"""Rewards by rule: right, wrong and useless answers, and rows that they cannot judge."""

import importlib.util
from fractions import Fraction

import pytest

from trainer.config import NAMED
from trainer.rewards import functions, maths, rules
from trainer.rewards.errors import RewardError


def reward(name, **options):
    entry = NAMED[name](function=name, **options)
    return functions.RewardFunction(entry, "reward.functions[0]")


def score(made, *answers, **row):
    return made(["p"] * len(answers), list(answers), [row] * len(answers)).tolist()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 12", 12),
        ("7 + 5 = 12.", 12),
        ("12.50", Fraction(25, 2)),
        ("1,234,567", 1234567),
        ("1,2", 2),
        ("-3/4", Fraction(-3, 4)),
        ("1e3", 1000),
        (".5", Fraction(1, 2)),
        (r"so \boxed{42}, and not 43", 42),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"$\dfrac{3}{4}$", Fraction(3, 4)),
        ("2 apples #### 9", 9),
        ("#### ", None),
        ("5 / 0", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_on(text, number):
    assert maths.number(text) == number


def test_math_by_numbers():
    made = reward("math", method="numbers")
    assert made.describe() == "math by numbers"
    assert score(made, "it is 1/2", "0.5", "0.51", "", "half", "x" * 5000, answer="0.50") == [
        *(1, 1, 0, 0, 0, 0)
    ]
    assert score(made, "12", answer=12) == [1]
    with pytest.raises(RewardError, match=r"functions\[0\]: math raised RowError: answer is 'x'; "):
        score(made, "12", answer="x")
    with pytest.raises(RewardError, match="no column answer; there are key; prompt 'p', answer"):
        score(made, "12", key="x")


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify")
def test_math_by_math_verify():
    made = reward("math", timeout=1.0)
    assert made.describe() == "math by math-verify"
    answers = (r"$\frac{2}{4}$", "0.5", r"\boxed{\frac{1}{3}}", "", "no idea")
    assert score(made, *answers, answer=r"\frac{1}{2}") == [1, 1, 0, 0, 0]
    # Worth no answer, and no reason to wait for it.
    assert score(made, "$9^{9^{9^{9^{9}}}}$", answer="3") == [0]


def test_math_verify_is_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    assert maths.method(NAMED["math"](function="math")) == "numbers"
    with pytest.raises(RewardError, match="pip install math-verify"):
        reward("math", method="math-verify")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("A or B? The answer is C", "C"),
        ("answer: **D**", "D"),
        (r"\boxed{C}, not A", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        ("(A) is wrong, so (B)", "B"),
        ("B", "B"),
        ("I think A", "A"),
        ("the answer is Apple", None),
        ("b", None),
        ("F", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_settles_on(text, letter):
    assert rules.chosen(text, "ABCD") == letter


def test_choice():
    made = reward("choice", letters="ABCD")
    assert score(made, "B", "(B)", "A", "", answer="B") == [1, 1, 0, 0]
    assert score(made, "C", answer=2) == [1]
    assert score(made, "C", answer="(C)") == [1]
    for wrong in ("E", 4, True, "apple"):
        with pytest.raises(RewardError, match="want one of ABCD, or 0 to 3"):
            score(made, "C", answer=wrong)


def test_regex():
    assert score(reward("regex", pattern=r"\d+"), "a 12", "none", "") == [1, 0, 0]
    assert score(reward("regex", pattern=r"\d+", whole=True), "12", "a 12") == [1, 0]
    assert score(reward("regex", pattern=r"(?i)yes"), "YES") == [1]


def test_length():
    made = reward("length", least=2, most=4, slack=2)
    texts = ("", "a", "a b", "a b c d", "a b c d e", "a " * 6, "a " * 60)
    assert score(made, *texts) == [-1, -0.5, 0, 0, -0.5, -1, -1]
    assert score(reward("length", most=3, slack=10, unit="characters"), "abcd") == pytest.approx(
        [-0.1]
    )
    assert score(reward("length", least=1, slack=1), "", "a " * 500) == [-1, 0]


def test_contains():
    assert score(reward("contains", texts=("a", "B")), "a B", "a b", "") == [1, 0.5, 0]
    assert score(reward("contains", texts=("B",), ignore_case=True), "b") == [1]
    made = reward("contains", column="must")
    assert score(made, "red", "blue", must="red") == [1, 0]
    assert score(made, "red", must=["red", "blue"]) == [0.5]
    for wrong in (3, [], [""]):
        with pytest.raises(RewardError, match="want a text, or a list of them"):
            score(made, "red", must=wrong)
