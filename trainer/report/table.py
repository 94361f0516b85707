"""The table at the end of a run: what each model gets right, gold, proxy and KL, by domain."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.runs.names import in_markup, label


def evaluations(run: RunFolder, policy: str) -> list[dict]:
    lines = [line for line in read_lines(run.metrics) if line["stage"] == "eval"]
    return [line for line in lines if line.get("policy") == policy]


def final_table(runs: Mapping[str, RunFolder]) -> Table | None:
    """Domains x {SFT, each run}: gold (judged by program, or absent), proxy and KL.

    The final evaluation; in the rows "over the run" the mean of all evaluations after the first
    third, because one evaluation of one seed is mostly noise.
    """
    columns: dict[str, tuple[dict, list[dict]]] = {}
    for name, run in runs.items():
        if not columns and (sft := evaluations(run, "sft")):
            columns["SFT"] = (sft[-1], sft)
        if policy := evaluations(run, "policy"):
            columns[name] = (policy[-1], policy[len(policy) // 3 :])
    if not columns:
        return None
    domains = [
        label(name)
        for name in next(iter(columns.values()))[0]
        if name.startswith("domain/") and name.endswith("/score")
    ]
    rows: list[tuple[str, str, bool]] = []  # title, metric, over the run
    shares = [name for name in next(iter(columns.values()))[0] if name.startswith("eval/pass@")]
    for share in (name.removeprefix("eval/") for name in shares if name[-1].isdigit()):
        for domain in domains:
            rows.append((f"{share:<7} {domain}", f"domain/{domain}/{share}", False))
        rows.append((f"{share:<7} mean", f"eval/{share}", False))
        rows.append((f"{share:<7} out of distribution", f"eval/ood_{share}", False))
    if shares:
        rows.append(("format  malformed answers", "eval/malformed", False))
    for domain in domains:
        rows.append((f"gold    {domain}", f"domain/{domain}/gold", False))
    rows.append(("gold    mean", "eval/gold", False))
    rows.append(("gold    worst domain", "eval/worst_domain_gold", False))
    rows.append(("gold    worst domain, over the run", "eval/worst_domain_gold", True))
    rows.append(("gold    mean, over the run", "eval/gold", True))
    rows.append(("gold    out of distribution", "eval/ood_gold", False))
    for kind in ("score", "kl"):
        for domain in domains:
            rows.append(
                (
                    f"{'proxy' if kind == 'score' else kind:<7} {domain}",
                    f"domain/{domain}/{kind}",
                    False,
                )
            )
        whole = "eval/proxy" if kind == "score" else "eval/kl"
        rows.append((f"{'proxy' if kind == 'score' else kind:<7} mean", whole, False))
    table = Table(title="Evaluation", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(in_markup(name), justify="right")
    previous = ""
    for title, metric, over_run in rows:
        cells = []
        for last, many in columns.values():
            lines = many if over_run else [last]
            figures = [line.get(metric) for line in lines]
            values = [x for x in figures if isinstance(x, int | float)]
            low, high = (last.get(f"{metric}_{end}") for end in ("low", "high"))
            both = isinstance(low, int | float) and isinstance(high, int | float)
            within = f" ({low:.2f}-{high:.2f})" if both else ""
            cells.append(f"{sum(values) / len(values):.3f}{within}" if values else "")
        if any(cells):
            kind = title.split()[0]
            if previous and kind != previous:
                table.add_section()
            previous = kind
            table.add_row(in_markup(title), *cells)
    return table
