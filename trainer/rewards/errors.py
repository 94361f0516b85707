"""What a reward did wrong: one line that names it, and the prompt and answer it did it to."""

from __future__ import annotations


class RewardError(ValueError):
    """One line: which reward function, and what it did."""

    for_user = True


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def at(prompt: str, answer: str, longest: int = 80) -> str:
    """For messages: prompt and answer, each in a few words."""

    def short(text: str) -> str:
        text = " ".join(text.split())
        return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")

    return f"prompt {short(prompt)}, answer {short(answer)}"
