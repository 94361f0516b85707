"""All that the page shows, as plain data: the page has it inside, and `watch` sends it anew.

Texts of runs are made harmless here (`names.shown`), and the page writes them as text, never as
HTML.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import yaml

from trainer import config as settings
from trainer.report import thin
from trainer.report.charts import Chart
from trainer.report.colours import SFT_NAME
from trainer.report.panels import SECTIONS, everything_else
from trainer.report.runs import SFT, Run, has_gold
from trainer.runs.names import shown

Document = dict[str, Any]


def sections(runs: list[Run]) -> list[tuple[str, str, list[Chart]]]:
    """Those with charts: title, what the reader should know, charts."""
    made = [(title, text, [c for c in charts(runs) if c]) for title, text, charts in SECTIONS]
    return [section for section in made if section[2]]


def document(
    runs: list[Run], title: str, parts: Sequence[tuple[str, str, list[Chart]]]
) -> Document:
    names = {chart.name for _, _, charts in parts for chart in charts}
    more = everything_else(runs, names)
    longest = thin.thinned([chart for _, _, charts in parts for chart in charts] + more)
    rest = [("Everything else that is logged", "Every metric without a chart above.", more)]
    said = {
        "title": title,
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "colour": run.colour,
                "settings": yaml.safe_dump(run.config, sort_keys=False) if run.config else "",
            }
            for run in runs
        ],
        "tiles": _tiles(runs),
        "table": _table(runs),
        "differences": _differences(runs),
        "sections": [
            {"title": title, "text": text, "charts": [_compact(chart) for chart in charts]}
            for title, text, charts in [*parts, *(rest if more else ())]
        ],
        "rest": bool(more),
        "thinned": longest,
        "samples": _samples(runs),
    }
    return _harmless(said)


def _compact(chart: Chart) -> dict[str, Any]:
    """Without what is empty."""
    said = {key: value for key, value in vars(chart).items() if value and key != "series"}
    said["series"] = [
        {f.name: _rounded(v) for f in dataclasses.fields(each) if (v := getattr(each, f.name))}
        for each in chart.series
    ]
    return said


def _rounded(value: Any) -> Any:
    """Five digits of each number; steps stay whole."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {_harmless(key): _harmless(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        numbers = all(each is None or isinstance(each, float | int) for each in value)
        return value if numbers else [_harmless(each) for each in value]  # which is most of a page
    return value


def _tiles(runs: list[Run]) -> list[dict[str, Any]]:
    """The two or three figures that matter, before and after."""
    if has_gold(runs):
        wanted = (
            ("worst domain, gold", "eval/worst_domain_gold"),
            ("mean gold", "eval/gold"),
            ("out of distribution, gold", "eval/ood_gold"),
        )
    else:
        wanted = (
            ("worst domain, proxy", "eval/worst_domain_score"),
            ("mean proxy", "eval/proxy"),
            ("KL", "eval/kl"),
        )
    tiles = []
    for label, key in wanted if any(run.final for run in runs) else ():
        sft = next((run.sft.get(key) for run in runs if run.sft), None)
        rows = [{"name": SFT, "colour": SFT_NAME, "value": number(sft)}]
        rows += [
            {"name": run.name, "colour": run.colour, "value": number(run.final.get(key))}
            for run in runs
            if run.final
        ]
        known = [row for row in rows if row["value"] is not None]
        if known:
            tiles.append({"label": label, "rows": known})
    return tiles


def _table(runs: list[Run]) -> dict[str, Any] | None:
    """Domains x {SFT, each run}: gold, proxy, KL at the last evaluation."""
    columns = [(SFT, run.sft) for run in runs if run.sft][:1]
    columns += [(run.name, {**run.final, **_over_the_run(run)}) for run in runs if run.final]
    if not columns:
        return None
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    rows = [(domain, [f"domain/{domain}/{kind}" for kind in ("gold", "score", "kl")])
            for domain in domains]  # fmt: skip
    rows += [
        ("mean", ["eval/gold", "eval/proxy", "eval/kl"]),
        ("worst domain", ["eval/worst_domain_gold", "eval/worst_domain_score", ""]),
        ("out of distribution", ["eval/ood_gold", "eval/ood_proxy", ""]),
        ("mean, over the run", [f"over/eval/{name}" for name in ("gold", "proxy", "kl")]),
        (
            "worst domain, over the run",
            ["over/eval/worst_domain_gold", "over/eval/worst_domain_score", ""],
        ),
    ]
    kinds = [
        (i, label)
        for i, label in enumerate(("gold", "proxy", "KL"))
        if any(line.get(keys[i]) is not None for _, line in columns for _, keys in rows)
    ]
    body = []
    for title, keys in rows:
        cells = [number(line.get(keys[i])) for i, _ in kinds for _, line in columns]
        if any(cell is not None for cell in cells):
            body.append({"name": title, "cells": cells})
    return {
        "blocks": [label for _, label in kinds],
        "columns": [name for name, _ in columns],
        "rows": body,
    }


def _over_the_run(run: Run) -> dict[str, float]:
    """over/<metric>: means of the policy's evaluations after the first third."""
    lines = [line for line in run.evaluations if line.get("policy") != "sft"]
    lines = lines[len(lines) // 3 :]
    out = {}
    for key in lines[-1] if lines else ():
        values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
        if key.startswith("eval/") and values:
            out[f"over/{key}"] = sum(values) / len(values)
    return out


def _differences(runs: list[Run]) -> list[list[str]]:
    """Settings in which the runs differ: a key, and its value in each."""
    flat = [settings.flat(run.config) for run in runs]
    keys = sorted({key for each in flat for key in each})
    hidden = [f"run.{name}" for name in ("output", "stages", "threads")]
    hidden += ["model.policy", "model.reward", "groups.reference_cache"]
    return [
        [key, *(str(each.get(key, "–")) for each in flat)]
        for key in keys
        if len({str(each.get(key)) for each in flat}) > 1
        and key not in hidden
        and not key.startswith("baselines")
    ]


def _samples(runs: list[Run]) -> dict[str, Any]:
    """Columns of all samples that fit; prompts and domains are said once, and numbered."""
    chosen = [thin.fitting(run.samples, thin.SAMPLES // len(runs)) for run in runs]
    prompts: dict[str, int] = {}
    domains: dict[str, int] = {}
    rows = []
    for i, lines in enumerate(chosen):
        for line in lines:
            prompt, domain = thin.cut(line["prompt"]), line.get("domain")
            rows.append(
                [
                    i,
                    line["step"],
                    prompts.setdefault(prompt, len(prompts)),
                    None if domain is None else domains.setdefault(str(domain), len(domains)),
                    *(number(line.get(key)) for key in ("group", "score", "gold", "kl")),
                    _verdict(line),
                    thin.cut(line["response"]),
                ]
            )
    return {
        "prompts": list(prompts),
        "domains": list(domains),
        "rows": rows,
        "all": sum(len(run.samples) for run in runs),
        "longest": thin.LONGEST,
    }


def _verdict(line: dict[str, Any]) -> str:
    if "right" not in line:
        return ""
    wrong = "wrong form" if line.get("malformed") else "wrong"
    return "right" if line["right"] else wrong


def number(value: Any) -> float | int | None:
    """For the page, whose JSON has no NaN; texts in a figure's place are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return _rounded(value)
