"""Tables of what the stages have found: all of it for one folder, and the few lines quoted.

No speed is shown of sources whose selftest or tests are red.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import record
from bench.gpu.stages import CHECKS, STAGES

Records = dict[str, dict[str, Any]]  # by stage
NOT_YET, NOT_SHOWN = "not measured yet", "not shown: red"
OURS, PLAIN = "gikernels", "torch"
STEP = "A training step of a random 0.5B model"
MEASURED = ("times", "small", "peers")


class Line(NamedTuple):
    """Of the table that is quoted: what it is called, and which rows it is made of."""

    title: str
    op: str
    mode: str
    shape: dict[str, int]


HEAD, SMALL, BOTH = {"N": 8192, "D": 4096, "V": 128256}, {"N": 8192, "D": 896}, "forward + backward"
LINES = (
    Line("`linear_logprobs`, forward", "linear_logprobs", "forward", HEAD),
    Line("`linear_logprobs`, forward + backward", "linear_logprobs", BOTH, HEAD),
    Line("`linear_policy_loss`, forward + backward", "linear_policy_loss", BOTH, HEAD),
    Line("`linear_logprobs`, both, D 896, V 151936", "linear_logprobs", BOTH, SMALL),
    Line("`linear_policy_loss`, both, D 896, V 151936", "linear_policy_loss", BOTH, SMALL),
    Line("`linear_logprobs` of 64 kept ids, both", "linear_logprobs_support", BOTH, HEAD),
    Line("`linear_gather_logprobs`, 16 ids, both", "linear_gather_logprobs", BOTH, HEAD),
    Line("`linear_divergence`, Jensen-Shannon, both", "linear_divergence", BOTH, HEAD),
    Line("`logprobs`, forward", "logprobs", "forward", {"N": 8192, "V": 128256}),
    Line("`logprobs`, forward + backward", "logprobs", BOTH, {"N": 8192, "V": 128256}),
    Line("`experience`, S 512, T 2048, fp32", "experience", "forward", {"S": 512, "T": 2048}),
    Line("`group_stats`, n 1048576, G 8, fp32", "groups", "forward", {"n": 1 << 20}),
    Line("`partition`, n 8192, K 8, fp32", "partition", "forward", {"n": 8192}),
)


def load(folder: Path) -> Records:
    found = ((s.name, record.read(folder / f"{s.name}.json")) for s in STAGES)
    return {name: data for name, data in found if data is not None}


def all_of(results: Path) -> list[Records]:
    """Of the folders gpu-*, those that were made on a GPU, by name."""
    there = (load(folder) for folder in sorted(results.glob("gpu-*")) if folder.is_dir())
    return [records for records in there if records and _first(records).get("size") == "gpu"]


def _first(records: Records) -> dict[str, Any]:
    return next(iter(records.values()))


def red(records: Records) -> list[str]:
    return [
        f"{name}: {records[name]['reason']}"
        for name in CHECKS
        if records.get(name, {}).get("status") in (record.FAILED, record.CRASHED)
    ]


# --- the table of docs/results.md ---------------------------------------------------------------

TITLES = (
    *("", "time", "of its limit", "peak extra MiB", "error", "dW's error"),
    *("plain torch", "best peer"),
)


def short(results: Path) -> str:
    folders = all_of(results)
    if not folders:
        rows = [(line.title, NOT_YET, *[""] * (len(TITLES) - 2)) for line in LINES]
        return "\n".join([*_table(TITLES, rows), "", f"{STEP}: {NOT_YET}."])
    return "\n\n".join(_of_one(records) for records in folders)


def _of_one(records: Records) -> str:
    rows = [_line(records, line) for line in LINES]
    return "\n".join([about(records), "", *_table(TITLES, rows), "", _training(records)])


def about(records: Records) -> str:
    first, found = _first(records), records.get("versions", {}).get("found", {})
    parts = [f"**{first['device']}**"]
    if versions := found.get("machine", {}).get("versions"):
        known = [name for name in ("torch", "triton", "python") if name in versions]
        parts.append(", ".join(f"{name} {versions[name]}" for name in known))
    if "product_tflops" in found:
        parts.append(f"product {found['product_tflops']:.4g} TFLOP/s")
        parts.append(f"copy {found['copy_tb_per_s']:.3g} TB/s")
    parts.append(f"sources {first['sources']}")
    checks = "; ".join(_check(records, name) for name in CHECKS)
    lines = [f"{', '.join(parts)}. Checks: {checks}."]
    if problems := red(records):
        lines.append(f"**Red, so no speed is shown.** {'; '.join(problems)}")
    return "\n".join(lines)


def _check(records: Records, name: str) -> str:
    data = records.get(name)
    if data is None:
        return f"{name} not run"
    counts = data["found"].get("counts", {})
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
    return f"{name} {data['status']}{f' ({said})' if said else ''}"


def _line(records: Records, line: Line) -> tuple[str, ...]:
    """Ours and plain torch from the stage that measured them first, peers from any."""
    rows = [row for row in _rows(records) if _is(row, line)]
    own = next((row for row in rows if row["contender"] == OURS), None)
    if own is None:
        return (line.title, NOT_YET, *[""] * (len(TITLES) - 2))
    if red(records):
        return (line.title, NOT_SHOWN, *[""] * (len(TITLES) - 2))
    plain = next((row for row in rows if row["contender"] == PLAIN), None)
    peers = [
        row
        for row in rows
        if row["contender"] not in (PLAIN, own["fraction_of"])
        and not row["contender"].startswith(OURS)
    ]
    best = min(peers, key=lambda row: row["median_ms"], default=None)
    errors = dict(own["errors"])
    of_weight = errors.pop("d weight", None)
    limit = "" if own["fraction"] is None else f"{own['fraction']:.0%} of {own['fraction_of']}"
    return (
        line.title,
        f"**{_ms(own)}**",
        limit,
        _mib(own),
        f"{max(errors.values()):.1e}" if errors else "",
        "" if of_weight is None else f"{of_weight:.1e}",
        "" if plain is None else _with_memory(plain),
        "" if best is None else f"{best['contender']} {_with_memory(best)}",
    )


def _is(row: dict[str, Any], line: Line) -> bool:
    fits = all(row["shape"].get(name) == size for name, size in line.shape.items())
    return fits and (row["op"], row["mode"]) == (line.op, line.mode)


def _rows(records: Records) -> Iterator[dict[str, Any]]:
    for stage in MEASURED:
        for case in records.get(stage, {}).get("found", {}).get("cases", {}).values():
            yield from case["rows"]


def _training(records: Records) -> str:
    found = records.get("training", {}).get("found", {})
    if "ours" not in found or red(records):
        why = NOT_SHOWN if red(records) else NOT_YET
        return f"{STEP}: {why}."
    ours, trl = found["ours"], found.get("trl")
    text = (
        f"{STEP}, {ours['tokens_per_step']:.0f} tokens: "
        f"{ours['tokens_per_second']:.0f} tokens/s, {ours['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"{ours['rollout_seconds']:.2f} of {ours['step_seconds']:.2f} s for sampling"
    )
    if "mfu" in ours:
        text += f", the update at {ours['mfu']:.0%} of the product's speed"
    if trl is not None:
        text += f"; TRL's GRPOTrainer {trl['tokens_per_second']:.0f} tokens/s, "
        text += f"{trl['peak_memory_bytes'] / 2**30:.1f} GiB"
    elif "trl_absent" in found:
        text += f"; TRL's GRPOTrainer absent: {found['trl_absent']}"
    if (sources := records["training"]["sources"]) != _first(records)["sources"]:
        text += f" (a later call, sources {sources})"
    return f"{text}."


# --- everything ---------------------------------------------------------------------------------


def whole(records: Records) -> str:
    """A folder's table.md: the stages, and every row of each case."""
    if not records:
        return "Nothing has run.\n"
    stages = [
        (s.name, data["status"], f"{data['seconds']:.0f} s" if "seconds" in data else "",
         data["reason"].replace("|", "/"))
        for s in STAGES if (data := records.get(s.name)) is not None
    ]  # fmt: skip
    lines = [about(records), "", *_table(("stage", "", "took", "why"), stages)]
    if not red(records):
        for name in (*MEASURED, "variants"):
            cases = records.get(name, {}).get("found", {}).get("cases", {})
            for label, case in cases.items():
                lines += ["", f"### {label}", "", *_case(case)]
        lines += ["", _training(records)]
    return "\n".join(lines) + "\n"


def _case(case: dict[str, Any]) -> list[str]:
    titles = ("mode", "", "time", "as a graph", "rate", "of its limit", "peak MiB", "errors")
    rows = [
        (
            row["mode"],
            row["contender"],
            _ms(row),
            "" if row["graph_ms"] is None else f"{row['graph_ms']:.4f} ms",
            f"{row['rate']:.4g} {row['unit']}",
            "" if row["fraction"] is None else f"{row['fraction']:.0%}",
            _mib(row),
            ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()),
        )
        for row in case["rows"]
    ]
    lines = _table(titles, rows) if rows else []
    return [*lines, *(f"- {a['contender']} absent: {a['reason']}" for a in case["absent"])]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def _ms(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:.3g} ms" if row["median_ms"] < 100 else f"{row['median_ms']:.0f} ms"


def _mib(row: dict[str, Any]) -> str:
    size = row["peak_extra_bytes"]
    return "" if size is None else f"{size / 2**20:.0f}"


def _with_memory(row: dict[str, Any]) -> str:
    return f"{_ms(row)}, {_mib(row)} MiB" if row["peak_extra_bytes"] is not None else _ms(row)
