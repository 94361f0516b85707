"""A page of bounded size from a run of any length: fewer points of a curve, fewer samples.

What is left out is counted, and the page says so. metrics.jsonl and samples.jsonl have everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from trainer.report.charts import Chart, Series

CURVES = 3_000_000
"""Bytes for all points of all curves, about."""
SAMPLES = 5_500_000
"""Bytes for all prompts and answers."""
FEWEST, POINT = 60, 32
"""Points that a curve always keeps; bytes of one: a step, a mean, a low and a high."""
ROW = 60
"""Bytes of a sample's figures."""
LONGEST = 4000
"""Characters of a prompt or an answer."""


def thinned(charts: Sequence[Chart]) -> int:
    """Curves longer than fits are made shorter, where they stand; returns the points of the longest
    one that was, or 0."""
    curves = [each for chart in charts if chart.kind == "line" for each in chart.series]
    most = max(FEWEST, CURVES // POINT // max(1, len(curves)))
    long = [each for each in curves if len(each.x) > most]
    longest = max((len(each.x) for each in long), default=0)
    for each in long:
        _thin(each, most)
    return longest


def _thin(curve: Series, most: int) -> None:
    """Each of `most` points is the mean of as many steps, with the lowest and the highest; so a
    spike stays to be seen."""
    x, y = curve.x, [float(value or 0) for value in curve.y]
    bounds = [i * len(x) // most for i in range(most + 1)]
    parts = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(bounds)]
    curve.x = [steps[-1] for steps, _ in parts]
    curve.y = [sum(values) / len(values) for _, values in parts]
    curve.low = [min(values) for _, values in parts]
    curve.high = [max(values) for _, values in parts]


def cut(text: str) -> str:
    """Beginning and end."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    left_out = f"[... {len(text) - 2 * half} characters are left out here ...]"
    return f"{text[:half]}\n{left_out}\n{text[-half:]}"


def fitting(samples: Sequence[dict[str, Any]], budget: int = SAMPLES) -> list[dict[str, Any]]:
    """Those that fit: of each stage the last step whole, or evenly chosen; then the earlier answers
    to prompts, prompt by prompt, so that whoever is there can be followed over the run."""
    last: dict[str, int] = {}
    for line in samples:
        last[line["stage"]] = max(line["step"], last.get(line["stage"], 0))
    final = [line for line in samples if line["step"] == last[line["stage"]]]
    prompts = {line["prompt"] for line in final}
    whole = sum(map(_bytes, prompts)) + sum(map(_size, final))
    if whole > budget:
        return final[:: -(-whole // budget)]
    budget -= whole
    earlier: dict[str, list[dict[str, Any]]] = {}
    for line in samples:
        if line["step"] != last[line["stage"]]:
            earlier.setdefault(line["prompt"], []).append(line)
    kept = final
    for prompt in sorted(earlier, key=lambda each: each not in prompts):
        size = sum(map(_size, earlier[prompt])) + (0 if prompt in prompts else _bytes(prompt))
        if size > budget:
            break
        budget -= size
        kept += earlier[prompt]
    return kept


def _size(line: dict[str, Any]) -> int:
    """On the page, of an answer and its figures. A prompt is there once."""
    return ROW + _bytes(line["response"])


def _bytes(text: str) -> int:
    """Of a text on the page, where some letters are escaped."""
    length = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return min(length + 5 * text.count("<") + text.count("\n"), 4 * LONGEST)
