"""Rewards from elsewhere: a scorer over HTTP, and a chat model that marks answers.

Requests go out several at a time, each with a time limit and more tries. What is no answer (no
connection, a time-out, 429, 5xx) is tried again; what is a wrong one (another 4xx, no JSON, no
scores) will not get better and is not.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainer.config.rewards import HttpReward, JudgeReward
from trainer.rewards.errors import RewardError, at, one_line
from trainer.rewards.rules import Row, Rule

BUSY = (408, 425, 429, 500, 502, 503, 504)


class NoAnswer(RuntimeError):
    """All tries have failed, or the answer is not what was asked for."""


def post(settings: HttpReward | JudgeReward, url: str, body: dict[str, Any]) -> Any:
    """The reply to one request, as JSON."""
    headers = {"Content-Type": "application/json"}
    if settings.token:
        if settings.token not in os.environ:
            raise NoAnswer(f"the environment has no {settings.token}")
        headers["Authorization"] = f"Bearer {os.environ[settings.token]}"
    data, problem = json.dumps(body, default=str).encode(), ""
    for attempt in range(settings.retries + 1):
        if attempt:
            time.sleep(settings.backoff * 2 ** (attempt - 1))
        request = urllib.request.Request(url, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=settings.timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code not in BUSY:
                break
            continue
        except OSError as error:  # no connection, a time-out, one that broke off
            problem = one_line(error)
            continue
        try:
            return json.loads(text)
        except ValueError as error:
            raise NoAnswer(f"{url}: not JSON: {one_line(error)}") from None
    tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
    raise NoAnswer(f"{url}: {problem}, after {tries}")


def http(settings: HttpReward) -> Rule:
    def ask(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        reply = post(settings, settings.url, {"prompts": prompts, "answers": answers, "meta": rows})
        scores = reply.get("scores") if isinstance(reply, dict) else None
        good = isinstance(scores, list) and len(scores) == len(answers)
        if not good or not all(_is_number(each) for each in scores or []):
            wanted = f"{{scores: {len(answers)} numbers}}"
            raise NoAnswer(f"{settings.url}: got {str(reply)[:80]}; want {wanted}")
        return [float(each) for each in scores or []]

    return _in_parts(settings, settings.batch, ask)


def judge(settings: JudgeReward) -> Rule:
    url = f"{settings.url.rstrip('/')}/chat/completions"
    pattern = re.compile(settings.pattern)

    def ask(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        asked = _filled(settings.question, prompts[0], answers[0], rows[0])
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": settings.max_tokens,
        }
        reply = post(settings, url, body)
        try:
            said = reply["choices"][0]["message"]["content"]
            found = list(pattern.finditer(said))[-1]
            mark = float(found[1] if pattern.groups else found[0])
        except (LookupError, TypeError, ValueError):
            raise NoAnswer(f"{url}: no mark in {str(reply)[:120]}") from None
        share = (mark - settings.lowest) / (settings.highest - settings.lowest)
        return [min(1.0, max(0.0, share))]

    return _in_parts(settings, 1, ask)


def _in_parts(settings: HttpReward | JudgeReward, size: int, ask: Rule) -> Rule:
    """Several requests at a time; the scores in the answers' order, whichever comes first."""

    def one(part: tuple[list[str], list[str], list[Row]]) -> list[float]:
        try:
            return ask(*part)
        except NoAnswer as error:
            if settings.on_error == "skip":
                return [math.nan] * len(part[1])  # the guard does not train on it, and counts it
            raise RewardError(f"{error}; {at(part[0][0], part[1][0])}") from None

    def score(prompts: list[str], answers: list[str], rows: list[Row]) -> list[float]:
        places = range(0, len(answers), size)
        parts = [(prompts[i : i + size], answers[i : i + size], rows[i : i + size]) for i in places]
        with ThreadPoolExecutor(settings.parallel) as pool:
            return [each for part in pool.map(one, parts) for each in part]

    return score


def _filled(question: str, prompt: str, answer: str, row: Row) -> str:
    """In one pass, so that braces in an answer fill in nothing."""
    values = {**row, "prompt": prompt, "answer": answer}

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return str(values[name]) if name in values else match[0]

    return re.sub(r"\{([\w.]+)\}", value, question)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


REMOTE: dict[str, Callable[..., Rule]] = {"http": http, "judge": judge}
