"""evidence.md, evidence.html, evidence.json and plots, from the results that are there.

The page is a list of blocks with two ways to be written down. What has not run is left out, and the
table of claims says so.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.evidence import claims
from bench.evidence.matrix import ARMS, SECTIONS, TUNING_SEEDS, WORLDS, Section
from bench.evidence.measure import FRONTIER, MARGIN, MEASURES, Runs
from bench.evidence.scheduler import Study
from bench.evidence.stats import Interval, WinRate
from trainer.report import RUN_COLOURS, SFT_COLOUR, STYLE

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
    "kl_final",
    "coef",
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
PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1120px;
  padding: 24px 20px 60px; }
h2 { font-size: 19px; margin: 40px 0 4px; }
p { color: #444; max-width: 760px; }
figure { margin: 0; }
figure img { max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }
tbody th { text-align: left; font-weight: 500; }
"""


@dataclass(frozen=True)
class Block:
    """kind: heading (level 2), text, table, picture."""

    kind: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def write(study: Study, arms: Sequence[str], target: Path) -> str:
    """What is there of these arms into `target`; what to print: the claims, and where that is."""
    seeds = sorted({record["seed"] for record in study.store.records.values()})
    runs = Runs(study, arms, seeds)
    if not runs.figures:
        return "no results yet"
    target.mkdir(parents=True, exist_ok=True)
    seen = claims.table(runs)
    blocks = [
        *_opening(runs),
        *_claims(seen),
        *plots(runs, target),
        *_wins(runs),
        *(block for section in SECTIONS.values() for block in _section(runs, section)),
        *_definitions(),
    ]
    title = "Evidence" if study.extra == () else "Evidence: a smoke run, which shows nothing"
    (target / "evidence.md").write_text(_markdown(title, blocks))
    (target / "evidence.html").write_text(_html(title, blocks, target))
    (target / "evidence.json").write_text(json.dumps(_plain(runs, seen), indent=1) + "\n")
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
    return f"{_aligned(lines)}\n\n{target / 'evidence.md'}"


# --- blocks -------------------------------------------------------------------------------------


def _opening(runs: Runs) -> list[Block]:
    records = [record for each in runs.records.values() for record in each.values()]
    commits = ", ".join(sorted({record["commit"] for record in records}))
    there = sorted({record["seed"] for record in records})
    lines = [
        f"{len(records)} runs of the toy world, seeds {', '.join(map(str, there))}, commit "
        f"{commits}. `python -m bench.evidence` makes this page again; docs/evidence.md reads it.",
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
        verdicts = list(dict.fromkeys(row.verdict for row in some))
        if len(verdicts) > 1:
            verdicts = [f"{row.claim.figure}: {row.verdict}" for row in some]
        rows.append((text, some[0].claim.source, compared, figures, "\n".join(verdicts)))
    about = (
        "Each difference is paired by seed, in brackets its 95 % interval (Student's t) and the "
        "number of seeds. Holds: the interval lies on the claim's side of 0 (`no worse`, `not "
        f"below`, `no cost`: above -{MARGIN}). No difference: it lies within {MARGIN} of 0. "
        "Undecided: none of these; more seeds would tell. Worst, hardest: domains; mean: over "
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
    for control in _controls(section, arms):
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


def _controls(section: Section, arms: Sequence[str]) -> list[str]:
    equal = section.control.replace("default", "ppo_equal")
    names = (section.control, equal, "default", "soft_ppo_equal")
    return [name for name in dict.fromkeys(names) if name in arms]


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
            "numbers). hardest: the domain in which the SFT model of the seed is worst, fixed. "
            "mean: over domains, of which the evaluation has equal parts. by share: domains "
            "weighed as in training. run: the mean over the evaluations during training. proxy - "
            "gold: its growth since SFT. gap: best less worst domain. hard group: the prompts that "
            "the default run of the seed holds for hard, the same prompts for every arm. AMI: "
            "adjusted mutual information of inferred group and true domain. Equal coefficient: "
            "kl.coef is the mean that the method used in that seed. collapses: falls of mean gold "
            "by more than 0.1 below its best so far.",
        ),
        Block("table", head=("world", "what it is"), rows=worlds),
    ]


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


# --- plots --------------------------------------------------------------------------------------


def plots(runs: Runs, target: Path) -> list[Block]:
    with matplotlib.rc_context(STYLE):
        made = {
            "evidence-curves.png": _curves(runs),
            "evidence-frontier.png": _frontier(runs),
            "evidence-differences.png": _forest(runs),
        }
    captions = {
        "evidence-curves.png": "Gold during training, means over seeds; the band is the 95 % "
        "interval of the paired difference to PPO at equal mean coefficient, drawn about the "
        "method's curve: where PPO's curve leaves it, they differ.",
        "evidence-frontier.png": "The method against PPO's sweep of coefficients, means over "
        "the seeds that all of these have. PPO without a penalty and the paper's own recipe, far "
        "below, are left out: see the tables.",
        "evidence-differences.png": "Worst domain's gold over the run: each arm less its control. "
        "What lies beyond the edge is cut off there, with its mean in figures.",
    }
    blocks = []
    for name, figure in made.items():
        if figure is not None:
            figure.savefig(target / name, dpi=130)
            blocks += [Block("picture", name), Block("text", captions[name])]
    return blocks


CURVES = ("default", "ppo_equal", "one_coef", "no_drawing")


def _curves(runs: Runs) -> Figure | None:
    shown = [arm for arm in CURVES if arm in runs.records]
    if "default" not in shown:
        return None
    figure = Figure(figsize=(9.6, 3.6))
    for place, (key, title) in enumerate(
        (("eval/worst_domain_gold", "Worst domain's gold"), ("eval/gold", "Mean gold")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        axes.set_title(title)
        axes.set_xlabel("PPO step")
        for arm, colour in zip(shown, RUN_COLOURS):
            steps, means = _mean_curve(runs, arm, key)
            axes.plot(steps, means, color=colour, marker="o", markersize=3, label=ARMS[arm].title)
        band = _band(runs, key)
        if band is not None:
            axes.fill_between(*band, color=RUN_COLOURS[0], alpha=0.15, linewidth=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _mean_curve(runs: Runs, arm: str, key: str) -> tuple[list[float], list[float]]:
    curves = [{e["step"]: e[key] for e in r["evaluations"]} for r in runs.records[arm].values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def _band(runs: Runs, key: str) -> tuple[list[float], list[float], list[float]] | None:
    from bench.evidence.measure import difference

    ours, theirs = runs.records["default"], runs.records.get("ppo_equal", {})
    if len(ours.keys() & theirs.keys()) < 2:
        return None

    def at(records: Mapping[int, dict], step: float) -> dict[int, float]:
        return {
            seed: line[key]
            for seed, record in records.items()
            for line in record["evaluations"]
            if line["step"] == step
        }

    steps, means = _mean_curve(runs, "default", key)
    halves = []
    for step in steps:
        seen = difference(at(ours, step), at(theirs, step))
        halves.append(seen.half if seen is not None else 0.0)
    low = [mean - half for mean, half in zip(means, halves)]
    return steps, low, [mean + half for mean, half in zip(means, halves)]


def _frontier(runs: Runs) -> Figure | None:
    sweep = runs.candidates("toy")
    if len(sweep) < 2 or "default" not in runs.figures:
        return None
    beside = {
        "default": RUN_COLOURS[0],
        "plus_weights": RUN_COLOURS[2],
        "one_coef": RUN_COLOURS[3],
        "soft": RUN_COLOURS[4],
        "sft": SFT_COLOUR,
    }
    beside = {arm: colour for arm, colour in beside.items() if arm in runs.figures}
    # Seeds differ by more than arms do: a mean over others would lie elsewhere for that alone.
    seeds = set.intersection(*(set(runs.figures[arm]) for arm in (*sweep, *beside)))
    if not seeds:
        return None

    figure = Figure(figsize=(9.6, 6.4))
    for place, (x, y) in enumerate(
        (
            ("coef", "worst_run"),
            ("coef", "gold_run"),
            ("kl_final", "worst_final"),
            ("kl_final", "gold_final"),
        ),
        1,
    ):
        axes = figure.add_subplot(2, 2, place)
        axes.set_xlabel(MEASURES[x].title)
        axes.set_title(MEASURES[y].title)
        points = sorted((runs.mean(arm, x, seeds), runs.mean(arm, y, seeds)) for arm in sweep)
        axes.plot(*zip(*points), color=RUN_COLOURS[1], marker="o", label="PPO, each coefficient")
        for arm, colour in beside.items():
            if (at := runs.mean(arm, x, seeds)) is not None:
                height = runs.mean(arm, y, seeds)
                axes.scatter([at], [height], color=colour, s=60, zorder=3, label=ARMS[arm].title)
    handles, labels = figure.axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


EDGE = 0.25
"""How far the plot of differences goes to either side."""


def _forest(runs: Runs) -> Figure | None:
    rows: list[tuple[str, Interval]] = []
    taken = set()
    for section in SECTIONS.values():
        for arm in section.arms:
            control = section.control if arm != section.control else None
            if control is None and (equal := _controls(section, section.arms)[1:]):
                control = equal[0]
            if control is None or {(arm, control), (control, arm)} & taken:
                continue
            seen = runs.paired(arm, control, "worst_run")
            if seen is not None and not math.isnan(seen.low) and ARMS[arm].kind == "ppo":
                taken.add((arm, control))
                rows.append((f"{ARMS[arm].title}  less  {control}", seen))
    if not rows:
        return None
    figure = Figure(figsize=(9.6, 0.8 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    places = range(len(rows), 0, -1)
    for place, (_, seen) in zip(places, rows):
        axes.plot([seen.low, seen.high], [place, place], color=RUN_COLOURS[1], linewidth=2)
        axes.scatter([seen.mean], [place], color=RUN_COLOURS[0], s=22, zorder=3)
        if abs(seen.mean) > EDGE:
            side = "left" if seen.mean < 0 else "right"
            edge = math.copysign(0.98 * EDGE, seen.mean)
            axes.text(edge, place, f"{seen.mean:+.2f}", ha=side, va="center", fontsize=8)
    axes.set_xlim(-EDGE, EDGE)
    axes.axvline(0, color="#999", linewidth=1)
    axes.set_yticks(list(places), [name for name, _ in rows])
    axes.grid(visible=False, axis="y")
    axes.set_ylim(0.3, len(rows) + 0.7)
    figure.suptitle("Worst domain's gold over the run, paired difference with 95 % interval")
    return figure


# --- writing ------------------------------------------------------------------------------------


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    lines = [f"# {title}", ""]
    for block in blocks:
        if block.kind == "heading":
            lines += [f"## {block.text}", ""]
        elif block.kind == "picture":
            lines += [f"![{block.text}]({block.text})", ""]
        elif block.kind == "table":
            lines.append(f"| {' | '.join(block.head)} |")
            lines.append(f"|{'---|' * len(block.head)}")
            rows = (" | ".join(row).replace("\n", "<br>") for row in block.rows)
            lines += [f"| {row} |" for row in rows]
            lines.append("")
        else:
            lines += [block.text, ""]
    return "\n".join(lines)


def _html(title: str, blocks: Sequence[Block], target: Path) -> str:
    parts = []
    for block in blocks:
        if block.kind == "heading":
            parts.append(f"<h2>{escape(block.text)}</h2>")
        elif block.kind == "picture":
            data = base64.b64encode((target / block.text).read_bytes()).decode()
            source = f"data:image/png;base64,{data}"
            parts.append(f'<figure><img alt="{escape(block.text)}" src="{source}"></figure>')
        elif block.kind == "table":
            head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
            body = "".join(_html_row(row) for row in block.rows)
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
        else:
            parts.append(f"<p>{escape(block.text)}</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _html_row(row: Sequence[str]) -> str:
    first, *rest = (escape(cell).replace("\n", "<br>") for cell in row)
    return f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"


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
