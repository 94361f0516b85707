"""evidence.md, evidence.html, evidence.json and plots, from the results that are there.

What has not run is left out, and the table of claims says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.evidence import claims
from bench.evidence.blocks import Block, html, markdown
from bench.evidence.matrix import (
    ARMS,
    SECTIONS,
    TUNING_SEEDS,
    Section,
    controls,
    sections_of,
)
from bench.evidence.measure import FRONTIER, MARGIN, MEASURES, Runs, by_domain
from bench.evidence.plots import plots
from bench.evidence.scheduler import Study
from bench.evidence.stats import Interval, WinRate, interval
from bench.evidence.worlds import WORLDS

TABLE = (
    "worst_run",
    "worst_final",
    "hardest_run",
    "gold_run",
    "gold_final",
    "share_final",
    "ood_final",
    "gap_final",
    "drift",
    "above_guessing",
    "guessing",
    "kl_final",
    "coef",
    "generated",
)
GROUPS = (
    "ami",
    "difficulty",
    "mass",
    "weight",
    "clamped",
    "own_worst_group",
    "hard_group",
    "hard_group_score",
    "group_gap",
)
STABILITY = ("noise", "collapses", "gold_lost", "seconds")
COMPARED = ("worst_run", "worst_final", "gold_run", "gold_final")


def write(study: Study, arms: Sequence[str], target: Path, world: str = "toy") -> str:
    """What is there of these arms into `target`; what to print: the claims, and where that is.
    `world`: whose study, with a page of its own."""
    seeds = sorted({record["seed"] for record in study.store.records.values()})
    runs = Runs(study, arms, seeds)
    if not runs.figures:
        return "no results yet"
    target.mkdir(parents=True, exist_ok=True)
    toy = world == "toy"
    seen = claims.table(runs) if toy else []
    blocks = [
        *_opening(runs, world),
        *(_claims(seen) if toy else []),
        *(plots(runs, target) if toy else []),
        *(_wins(runs) if toy else []),
        *(block for name in sections_of(world) for block in _section(runs, SECTIONS[name])),
        *([] if toy else _domains(runs)),
        *_definitions(),
    ]
    title = "Evidence" if toy else f"Evidence: the world {world}"
    title = title if study.extra == () else "Evidence: a smoke run, which shows nothing"
    name = "evidence" if toy else f"evidence-{world}"
    (target / f"{name}.md").write_text(markdown(title, blocks))
    (target / f"{name}.html").write_text(html(title, blocks, target))
    (target / f"{name}.json").write_text(json.dumps(_plain(runs, seen), indent=1) + "\n")
    lines = [
        (
            row.claim.text,
            row.claim.figure,
            row.claim.compared,
            _interval(row.interval),
            _bootstrap(row.interval),
            row.verdict,
        )
        for row in seen
        if row.verdict != claims.NO_DATA
    ]
    return f"{_aligned(lines)}\n\n{target / name}.md" if toy else f"{target / name}.md"


# --- blocks -------------------------------------------------------------------------------------


def _opening(runs: Runs, world: str) -> list[Block]:
    records = [record for each in runs.records.values() for record in each.values()]
    commits = ", ".join(sorted({record["commit"] for record in records}))
    there = sorted({record["seed"] for record in records})
    lines = [
        f"{len(records)} runs of the world {world}, seeds {', '.join(map(str, there))}, commit "
        f"{commits}. `python -m bench.evidence{'' if world == 'toy' else f' --world {world}'}` "
        "makes this page again; docs/evidence.md reads it.",
    ]
    if set(there) & set(TUNING_SEEDS):
        lines.append("**These are tuning seeds: no evidence.**")
    return [Block("text", line) for line in lines]


def _claims(seen: Sequence[claims.Seen]) -> list[Block]:
    """A row for each claim, with all the figures that speak to it."""
    together: dict[str, list[claims.Seen]] = {}
    for row in seen:
        if row.verdict != claims.NO_DATA:
            together.setdefault(row.claim.text, []).append(row)
    rows = []
    for text, some in together.items():
        figures = "\n".join(f"{row.claim.figure} {_interval(row.interval)}" for row in some)
        compared = "\n".join(dict.fromkeys(row.claim.compared for row in some))
        said = [_verdict(row) for row in some]
        verdicts = list(dict.fromkeys(said))
        if len(verdicts) > 1:
            verdicts = [f"{row.claim.figure}: {each}" for row, each in zip(some, said)]
        rows.append((text, some[0].claim.source, compared, figures, "\n".join(verdicts)))
    about = (
        "Each difference is paired by seed, in brackets its 95 % interval (Student's t) and the "
        "number of seeds. Holds: the interval lies on the claim's side of 0 (`no worse`, `not "
        f"below`, `no cost`: above -{MARGIN}). No difference: it lies within {MARGIN} of 0. "
        "Undecided: none of these; so many seeds would tell if the difference is what it seems. "
        "Worst, hardest, easiest: domains; mean: over "
        "domains; by share: as often as training has them; run: over the evaluations during "
        "training; final: the last policy."
    )
    missing = dict.fromkeys(row.claim.text for row in seen if row.verdict == claims.NO_DATA)
    return [
        Block("heading", "What is claimed and what we see"),
        Block("text", about),
        Block("table", head=("claim", "whose", "compared", "seen", "verdict"), rows=tuple(rows)),
        *([Block("text", f"Not run: {'; '.join(missing)}.")] if missing else []),
    ]


def _verdict(row: claims.Seen) -> str:
    if row.verdict != claims.UNDECIDED or row.interval is None:
        return row.verdict
    needed = claims.seeds_needed(row.interval)
    return f"{row.verdict} ({f'about {needed}' if needed else 'more than 1000'} seeds would tell)"


def _wins(runs: Runs) -> list[Block]:
    rows = []
    for ours, theirs in (
        ("default", "sft"),
        ("default", "ppo_equal"),
        *(("default", name) for name in runs.sweep("toy") if name != "ppo_equal"),
        ("default", "soft"),
        ("default", "paper"),
        ("soft", "soft_ppo_equal"),
        ("ppo_equal", "sft"),
    ):
        if (seen := runs.win_rate(ours, theirs)) is not None:
            rows.append((ARMS[ours].title, ARMS[theirs].title, *_win_cells(seen)))
    for arm in ("default", "ppo_equal", "sft"):
        if (seen := runs.self_rate(arm)) is not None:
            rows.append((ARMS[arm].title, "itself, other random numbers", *_win_cells(seen)))
    if not rows:
        return []
    return [
        Block("heading", "Win rates"),
        Block(
            "text",
            "By gold on the same evaluation prompts, last policies; a tie is half a win. The "
            "interval is a bootstrap over seeds and prompts. A policy against itself shows what no "
            "difference looks like.",
        ),
        Block(
            "table",
            head=("ours", "against", "win rate [95 %]", "wins", "ties", "losses", "seeds"),
            rows=tuple(rows),
        ),
    ]


def _win_cells(seen: WinRate) -> tuple[str, ...]:
    return (
        f"{seen.rate:.3f} [{seen.low:.3f}, {seen.high:.3f}]",
        *(f"{share:.1%}" for share in (seen.wins, seen.ties, seen.losses)),
        str(seen.seeds),
    )


def _section(runs: Runs, section: Section) -> list[Block]:
    arms = [arm for arm in section.arms if arm in runs.figures]
    if not arms:
        return []
    blocks = [Block("heading", section.title), Block("text", section.about)]
    steadied = (SECTIONS["main"], SECTIONS["paper"])
    for text, names in (
        ("Means over seeds; the number of seeds in brackets.", TABLE),
        ("Groups and what is done with them.", GROUPS),
        ("Stability.", STABILITY),
    ):
        rows = [
            (f"{ARMS[arm].title} ({len(runs.figures[arm])})", *_means(runs, arm, names))
            for arm in arms
        ]
        rows = [row for row in rows if any(row[1:])]
        if rows and (names is not STABILITY or section in steadied):
            blocks += [Block("text", text), Block("table", head=_head(names), rows=tuple(rows))]
    for control in controls(section, arms):
        rows = [
            (ARMS[arm].title, *(_interval(runs.paired(arm, control, name)) for name in COMPARED))
            for arm in arms
            if arm != control
        ]
        rows = [row for row in rows if any(cell != "" for cell in row[1:])]
        if rows:
            blocks += [
                Block("text", f"Less {ARMS[control].title}, paired by seed [95 %] (seeds)."),
                Block("table", head=_head(COMPARED), rows=tuple(rows)),
            ]
    for prefix, text in (
        ("coef", "Less PPO's curve at the arm's own mean KL coefficient [95 %] (seeds)."),
        ("kl", "Less PPO's curve at the arm's own final KL, level beyond its ends."),
    ):
        names = [f"{prefix}:{name}" for name in FRONTIER]
        rows = [
            (ARMS[arm].title, *(_interval(runs.own(arm, name)) for name in names)) for arm in arms
        ]
        rows = [row for row in rows if any(row[1:])]
        if rows:
            blocks += [
                Block("text", text),
                Block("table", head=_head(FRONTIER), rows=tuple(rows)),
            ]
    if (best := _against_best(runs, section, arms)) is not None:
        blocks += best
    return blocks


def _domains(runs: Runs) -> list[Block]:
    """Gold of each domain, final: the mean over seeds and draws, with the interval over seeds."""
    by_arm: dict[str, dict[str, list[float]]] = {}
    for arm, by_seed in runs.records.items():
        for record in by_seed.values():
            draws = [by_domain(draw["metrics"], "gold") for draw in record["draws"]]
            for name in draws[0]:
                mean = sum(draw[name] for draw in draws) / len(draws)
                by_arm.setdefault(arm, {}).setdefault(name, []).append(mean)
    names = list(dict.fromkeys(name for each in by_arm.values() for name in each))
    rows = [
        (ARMS[arm].title, *(_level(interval(each[name])) for name in names))
        for arm, each in by_arm.items()
    ]
    guessed = [
        record["guessing"]
        for by_seed in runs.records.values()
        for record in by_seed.values()
        if "guessing" in record
    ]
    if guessed:
        rows.append(("guessing", *(f"{guessed[0][name]:.3f}" for name in names)))
    return [
        Block("heading", "By family"),
        Block("text", "Share of right answers (pass@1), last policy [95 % over seeds] (seeds)."),
        Block("table", head=("", *names), rows=tuple(rows)),
    ]


def _against_best(runs: Runs, section: Section, arms: Sequence[str]) -> list[Block] | None:
    ours = section.control
    if ours not in arms or len(runs.sweep(ARMS[ours].world)) < 3:
        return None
    rows = []
    for measure in (*COMPARED, "share_final", "ood_final"):
        for hindsight, how in ((True, "these seeds"), (False, "the other seeds")):
            seen, best = runs.against_best(ours, measure, hindsight)
            if seen is not None:
                rows.append((MEASURES[measure].title, how, best, _interval(seen)))
    text = (
        f"{ARMS[ours].title} less PPO at its best coefficient. Best on these very seeds flatters "
        "PPO, which gets the pick of several; best on the other seeds does not."
    )
    if not rows:
        return None
    return [
        Block("text", text),
        Block("table", head=("figure", "best on", "which", "difference"), rows=tuple(rows)),
    ]


def _means(runs: Runs, arm: str, names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        mean = runs.mean(arm, name)
        cells.append("" if mean is None else f"{mean:.{MEASURES[name].digits}f}")
    return cells


def _head(names: Sequence[str]) -> tuple[str, ...]:
    return ("", *(MEASURES[name].short for name in names))


def _definitions() -> list[Block]:
    worlds = tuple((name, world.about) for name, world in WORLDS.items())
    return [
        Block("heading", "What the words mean"),
        Block(
            "text",
            "gold: judged by program; nothing trains on it. worst: the lowest of the domains at "
            "each evaluation (final: of their means over four evaluations with other random "
            "numbers). hardest, easiest: the domain in which the SFT model of the seed is worst, "
            "best, fixed. mean: over domains, of which the evaluation has equal parts. by share: "
            "domains weighed as in training. run: the mean over the evaluations during training. "
            "proxy - gold: its growth since SFT. gap: best less worst domain. hard group: the "
            "prompts that the default run of the seed holds for hard, the same prompts for every "
            "arm. AMI: adjusted mutual information of inferred group and true domain. Equal "
            "coefficient: "
            "kl.coef is the mean that the method used in that seed. collapses: falls of mean gold "
            "by more than 0.1 below its best so far.",
        ),
        Block("table", head=("world", "what it is"), rows=worlds),
    ]


def _level(seen: Interval) -> str:
    if math.isnan(seen.low):
        return f"{seen.mean:.3f} (1)"
    return f"{seen.mean:.3f} [{seen.low:.3f}, {seen.high:.3f}] ({seen.n})"


def _interval(seen: Interval | None) -> str:
    if seen is None:
        return ""
    size = max(abs(seen.mean), 0.0 if math.isnan(seen.low) else seen.half)
    digits = 3 if size >= 0.002 or size == 0 else min(8, 2 - math.floor(math.log10(size)))
    if math.isnan(seen.low):
        return f"{seen.mean:+.{digits}f} (1)"
    return f"{seen.mean:+.{digits}f} [{seen.low:+.{digits}f}, {seen.high:+.{digits}f}] ({seen.n})"


def _bootstrap(seen: Interval | None) -> str:
    """Over seeds; narrower than Student's with few of them."""
    if seen is None or math.isnan(seen.low):
        return ""
    return "bootstrap [{:+.3f}, {:+.3f}]".format(*seen.bootstrap)


# --- writing ------------------------------------------------------------------------------------


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns for the terminal."""
    if not rows:
        return "nothing to compare yet"
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _plain(runs: Runs, seen: Sequence[claims.Seen]) -> dict:
    """Every figure by arm and seed, and every verdict; without the answers."""
    return {
        "measures": {name: measure.title for name, measure in MEASURES.items()},
        "arms": {
            name: {
                "title": ARMS[name].title,
                "world": ARMS[name].world,
                "overrides": list(ARMS[name].overrides),
                "coef_from": ARMS[name].coef_from,
                "disturb": dict(ARMS[name].disturb),
                "seeds": {
                    str(seed): {k: round(v, 6) for k, v in sorted(each.items())}
                    for seed, each in sorted(by_seed.items())
                },
            }
            for name, by_seed in runs.figures.items()
        },
        "claims": [
            {
                "claim": row.claim.text,
                "source": row.claim.source,
                "want": row.claim.want,
                "figure": row.claim.figure,
                "compared": row.claim.compared,
                "verdict": row.verdict,
                "seen": _without_nan(asdict(row.interval)) if row.interval else None,
            }
            for row in seen
        ],
    }


def _without_nan(values: dict) -> dict:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
        if name != "bootstrap"
    } | {"bootstrap": [None if math.isnan(end) else end for end in values["bootstrap"]]}
