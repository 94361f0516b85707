"""The table and the plot of a results file.

python -m bench.ops.report FILE.json [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def load(path: Path) -> Results:
    return json.loads(path.read_text())


OURS, PEER, BARE = "#d1495b", "#4a6fa5", "#cccccc"


def _case(row: dict) -> tuple:
    return row["op"], tuple(row["shape"].items()), row["dtype"], row["mode"]


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _error(row: dict) -> str:
    """The worst of the values and the worst of the gradients, and whether that is good enough."""
    gradients = [e for name, e in row["errors"].items() if name.startswith("d ")]
    values = [e for name, e in row["errors"].items() if not name.startswith("d ")]
    if not row["errors"]:
        return ""
    text = " / ".join(f"{max(e):.1e}" for e in (values, gradients) if e)
    return text if row["within_bound"] else f"**{text}**"


HEAD = (
    "| | median ms | 20 % | 80 % | {unit} | of {baseline} | peak extra MiB | error | lacks |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|",
)


def markdown(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"# {machine['device']}, {results['date']}, commit {results['commit']}",
        "",
        f"{versions}. Tests before: {results['tests']}.",
        "",
        "Runs are interleaved; peak extra memory is what a call needs beyond its inputs, gradients "
        "included. Error: the largest, in units of the largest true value, of values / gradients "
        "against float64; in bold where above twice that of plain torch.",
    ]
    for (op, shape, dtype, mode), rows in groupby(results["rows"], _case):
        rows = list(rows)
        first = rows[0]
        sizes = ", ".join(f"{k} {v}" for k, v in shape)
        lines += [
            "",
            f"## {op}, {mode}: {sizes}, {dtype}",
            "",
            f"Rate counts {first['formula']}.",
            "",
        ]
        lines += [
            HEAD[0].format(unit=first["unit"], baseline=first["fraction_of"]),
            HEAD[1],
        ]
        for r in sorted(rows, key=lambda r: r["median_ms"]):
            cells = (
                r["contender"],
                f"{r['median_ms']:.3f}",
                f"{r['p20_ms']:.3f}",
                f"{r['p80_ms']:.3f}",
                f"{r['rate']:.4g}",
                "" if r["fraction"] is None else f"{100 * r['fraction']:.0f} %",
                _size(r["peak_extra_bytes"]),
                _error(r),
                r["lacks"],
            )
            lines.append("| " + " | ".join(cells) + " |")
        if graphs := [r for r in rows if r.get("graph_ms") is not None]:
            times = ", ".join(f"{r['contender']} {r['graph_ms']:.4f} ms" for r in graphs)
            lines += ["", f"As a replayed CUDA graph, caches warm: {times}."]
    if results["absent"]:
        lines += ["", "## Absent", ""]
        lines += [f"- {a['contender']} ({a['case']}): {a['reason']}" for a in results["absent"]]
    return "\n".join(lines) + "\n"


def write_csv(results: Results, path: Path) -> None:
    fixed = {"date": results["date"], "commit": results["commit"]}
    fixed["device"] = results["machine"]["device"]
    with path.open("w", newline="") as file:
        writer = None
        for row in results["rows"]:
            flat = {
                **fixed,
                **row,
                "shape": " ".join(f"{k}={v}" for k, v in row["shape"].items()),
                "errors": " ".join(
                    f"{k.replace(' ', '_')}={v:.3e}" for k, v in row["errors"].items()
                ),
            }
            if writer is None:
                writer = csv.DictWriter(file, flat)
                writer.writeheader()
            writer.writerow(flat)


def plot(results: Results, path: Path) -> None:
    """A panel for each case and mode: a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(key, list(rows)) for key, rows in groupby(results["rows"], _case)]
    height = 0.9 + 0.28 * max(len(rows) for _, rows in panels)
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, height * len(panels)), squeeze=False)
    for axis, ((op, shape, dtype, mode), rows) in zip(axes[:, 0], panels):
        rows.sort(key=lambda r: -r["median_ms"])
        names = [r["contender"] for r in rows]
        colours = [
            OURS if n.startswith("gikernels") else BARE if n == r["fraction_of"] else PEER
            for n, r in zip(names, rows)
        ]
        spread = [
            [max(0, r["median_ms"] - r["p20_ms"]) for r in rows],
            [max(0, r["p80_ms"] - r["median_ms"]) for r in rows],
        ]
        axis.barh(names, [r["median_ms"] for r in rows], xerr=spread, color=colours, ecolor="#333")
        sizes = " ".join(f"{k}={v}" for k, v in shape)
        axis.set_title(f"{op}, {mode}: {sizes} {dtype}", fontsize=9, loc="left")
        axis.set_xlabel("ms (median, 20-80 %)", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{results['machine']['device']}, {results['commit']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a .json of bench/results/")
    parser.add_argument("--plot", type=Path, help="also draw the plot there")
    args = parser.parse_args()
    results = load(args.file)
    print(markdown(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
