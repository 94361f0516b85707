"""report.html: what its runs are, the figures that matter, a table, the panels, sample answers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import matplotlib
import yaml

from trainer import config as settings
from trainer.report.panels import SECTIONS
from trainer.report.plots import STYLE, Panel
from trainer.report.runs import SFT, SFT_COLOUR, Run, has_gold, read_runs
from trainer.runs.names import in_html


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """One folder: its report.html and plots/. Several: a comparison, in <first>/comparison/ or
    in `output`. Runs under <folder>/baselines/ are shown beside their own."""
    folders = [Path(folder) for folder in folders]
    runs = read_runs(folders)
    target = output or (folders[0] if len(folders) == 1 else folders[0] / "comparison")
    (target / "plots").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        sections = [
            _section(title, text, [panel for panel in panels(runs) if panel], target)
            for title, text, panels in SECTIONS
        ]
    title = "Run report" if len(folders) == 1 else "Comparison of runs"
    page = _text("page.html").format(
        style=_text("page.css"),
        title=in_html(f"{title}: {', '.join(folder.resolve().name for folder in folders)}"),
        heading=in_html(title),
        runs="".join(_legend_entry(run) for run in runs),
        tiles=_tiles(runs),
        table=_table(runs),
        differences=_differences(runs),
        sections="".join(sections),
        samples=_samples(runs),
        settings="".join(
            f"<details><summary>Settings of {in_html(run.name)}</summary>"
            f"<pre>{in_html(yaml.safe_dump(run.config, sort_keys=False))}</pre></details>"
            for run in runs
        ),
    )
    path = target / "report.html"
    aside = path.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def _text(file: str) -> str:
    return resources.files("trainer.report").joinpath(file).read_text(encoding="utf-8")


def _section(title: str, text: str, panels: list[Panel], target: Path) -> str:
    if not panels:
        return ""
    pictures = []
    for panel in panels:
        buffer = io.BytesIO()
        panel.figure.savefig(buffer, format="png", dpi=150)
        (target / "plots" / f"{panel.name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        alt = in_html(panel.figure.axes[0].get_title(loc="left") or panel.name)
        caption = f"<figcaption>{in_html(panel.caption)}</figcaption>" if panel.caption else ""
        pictures.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{caption}</figure>'
        )
    return (
        f"<h2>{in_html(title)}</h2><p>{in_html(text)}</p>"
        f'<div class="panels">{"".join(pictures)}</div>'
    )


def _legend_entry(run: Run) -> str:
    return (
        f'<span class="run"><i style="background:{run.colour}"></i>{in_html(run.name)} '
        f"<small>{in_html(str(run.folder))}</small></span>"
    )


def _tiles(runs: list[Run]) -> str:
    """The two or three figures that matter, before and after."""
    if not any(run.final for run in runs):
        return ""
    gold = has_gold(runs)
    wanted = (
        ("worst domain, gold", "eval/worst_domain_gold"),
        ("mean gold", "eval/gold"),
        ("out of distribution, gold", "eval/ood_gold"),
    )
    if not gold:
        wanted = (
            ("worst domain, proxy", "eval/worst_domain_score"),
            ("mean proxy", "eval/proxy"),
            ("KL", "eval/kl"),
        )
    tiles = []
    for label, key in wanted:
        sft = next((run.sft.get(key) for run in runs if run.sft), None)
        rows = [(SFT, SFT_COLOUR, sft)] + [
            (run.name, run.colour, run.final.get(key)) for run in runs if run.final
        ]
        entries = "".join(
            f'<div><i style="background:{colour}"></i>{in_html(name)}<b>{_number(value)}</b></div>'
            for name, colour, value in rows
            if value is not None
        )
        if entries:
            tiles.append(f'<div class="tile"><h3>{label}</h3>{entries}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _table(runs: list[Run]) -> str:
    """Domains x {SFT, each run}: gold, proxy, KL at the last evaluation."""
    columns = [(SFT, run.sft) for run in runs if run.sft][:1]
    columns += [(run.name, {**run.final, **_over_the_run(run)}) for run in runs if run.final]
    if not columns:
        return ""
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
    head = "".join(f'<th class="block" colspan="{len(columns)}">{label}</th>' for _, label in kinds)
    names = "".join(
        f"<th{_block(column)}>{in_html(name)}</th>" for column, (name, _) in enumerate(columns)
    ) * len(kinds)
    body = []
    for title, keys in rows:
        cells = []
        for i, label in kinds:
            values = [line.get(keys[i]) for _, line in columns]
            known = [value for value in values if value is not None]
            best = max(known) if known and label == "gold" else None
            for column, value in enumerate(values):
                number = _number(value)
                number = f"<b>{number}</b>" if best is not None and value == best else number
                cells.append(f"<td{_block(column)}>{number}</td>")
        if any(">–<" not in cell for cell in cells):
            body.append(f"<tr><th>{in_html(title, 80)}</th>{''.join(cells)}</tr>")
    return (
        f'<h2>Last evaluation</h2><div class="scroll"><table class="figures"><thead><tr><th></th>'
        f"{head}</tr><tr><th></th>{names}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p>One seed: differences of a few hundredths are noise. Over the run: the mean of all "
        "evaluations after the first third, which is steadier than the last one.</p>"
    )


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


def _block(column: int) -> str:
    """A line to the left of each block of columns."""
    return ' class="block"' if column == 0 else ""


def _differences(runs: list[Run]) -> str:
    """Settings in which the runs differ."""
    flat = [settings.flat(run.config) for run in runs]
    keys = sorted({key for each in flat for key in each})
    hidden = ("run.output", "run.stages", "run.threads", "model.policy", "model.reward")
    rows = [
        f"<tr><th>{in_html(key)}</th>"
        + "".join(f"<td>{in_html(str(each.get(key, '–')))}</td>" for each in flat)
        + "</tr>"
        for key in keys
        if len({str(each.get(key)) for each in flat}) > 1
        and key not in hidden
        and not key.startswith("baselines")
    ]
    if not rows:
        return ""
    names = "".join(f"<th>{in_html(run.name)}</th>" for run in runs)
    return (
        f'<h2>What differs between the runs</h2><div class="scroll"><table><thead><tr><th></th>'
        f"{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _samples(runs: list[Run], each: int = 4) -> str:
    """The same few prompts of each domain, with every run's answer."""
    shown = [run for run in runs if run.final_samples]
    if not shown:
        return ""
    counts: dict[str, int] = {}
    body = []
    by_prompt = [{line["prompt"]: line for line in run.final_samples} for run in shown]
    in_order = {domain: i for i, domain in enumerate(shown[0].domains)}
    for prompt, line in sorted(
        by_prompt[0].items(), key=lambda item: in_order.get(str(item[1].get("domain")), 99)
    ):
        domain = str(line.get("domain") or "")
        counts[domain] = counts.get(domain, 0) + 1
        if counts[domain] > each:
            continue
        answers = []
        for run, lines in zip(shown, by_prompt):
            theirs = lines.get(prompt)
            if theirs:
                figures = " · ".join(
                    f"{label} {_number(theirs[key], 2)}"
                    for key, label in (("gold", "gold"), ("score", "proxy"), ("group", "group"))
                    if theirs.get(key) is not None
                )
                if "right" in theirs:
                    wrong = "wrong form" if theirs.get("malformed") else "wrong"
                    figures += f" · {'right' if theirs['right'] else wrong}"
                answers.append(
                    f'<div class="answer" style="border-color:{run.colour}">'
                    f"<small>{in_html(run.name)} · {figures}</small>"
                    f"<p>{in_html(theirs['response'])}</p></div>"
                )
        label = f"<small>{in_html(domain, 80)}</small>" if domain else ""
        body.append(
            f'<div class="sample">{label}<p class="prompt">{in_html(prompt)}</p>{"".join(answers)}'
            "</div>"
        )
    return f"<h2>Sample answers</h2><p>Of the last evaluation.</p>{''.join(body)}"


def _number(value: float | None, digits: int = 3) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"
