"""One case: everybody's error against float64, then times of one interleaved run, and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.host.process import CLEAR
from bench.ops import memory, peers, timing, truth
from bench.ops.calls import errors, runner, within_bound
from bench.ops.case import BOTH, UNITS, Case, Work


def reason(error: BaseException) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return "out of memory"
    first = str(error).strip().split("\n")[0]
    return first if type(error).__name__ == "Absent" else f"{type(error).__name__}: {first}"[:300]


def row_of(
    case: Case, mode: str, name: str, work: Work, t: timing.Times, base: timing.Times | None
) -> dict:
    """The figures of a contender's times; those of its memory and errors are still to come."""
    unit, scale = UNITS[work.unit]
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode,
        "contender": name,
        "median_ms": 1e3 * t.median,
        "p20_ms": 1e3 * t.low,
        "p80_ms": 1e3 * t.high,
        "graph_ms": None,
        "calls": t.calls,
        "rate": work.amount / t.median / scale,
        "unit": unit,
        "formula": work.formula,
        "fraction": base.median / t.median if base else None,
        "fraction_of": work.baseline_name,
        "peak_extra_bytes": None,
        "memory_method": None,
        "errors": {},
        "within_bound": None,
        "lacks": "",
    }


GRAPH_BELOW = 2e-3  # seconds of a call: there the Python around it may be what is measured


def measure(
    case: Case,
    where: tuple[str, int],  # size and index, for the memory of a process of its own
    device: torch.device,
    seconds: float,
    say: Callable[[str], None] = print,
    *,
    truths: dict | None = None,  # errors at the full size; filled, for the next call on this case
) -> tuple[list[dict], list[dict]]:
    """Rows of figures, and who is absent and why."""
    rows: list[dict] = []
    absent: list[dict] = []

    def miss(name: str, where: str, error: Exception) -> None:
        absent.append({"case": where, "contender": name, "reason": reason(error)})

    peers.forget_compiled()  # beyond a few shapes dynamo would time eager code under its name
    inputs = case.inputs(case.shape, case.dtype, device)
    found: dict[str, dict[str, float]] = {}
    for contender in case.contenders:
        try:
            if truths is None or case.finish is None:
                found[contender.name] = errors(case, contender, device)
            else:
                found[contender.name] = truth.errors(case, contender, inputs, truths)
        except Exception as error:
            miss(contender.name, case.label, error)
        if contender.name not in found:
            timing.release(device)
    for mode, work in case.work.items():
        label = f"{case.label}, {mode}"
        builds: dict[str, Callable[[], Callable[[], Any]]] = {
            c.name: partial(runner, case, c, inputs, mode)
            for c in case.contenders
            if c.name in found and not (mode == BOTH and c.forward_only)
        }
        builds[work.baseline_name] = partial(work.baseline, inputs)
        runners: dict[str, Callable[[], Any]] = {}
        for name, build in builds.items():
            try:
                fn = build()
                fn()  # compiles, and shows who runs out of memory
                runners[name] = fn
            except Exception as error:
                miss(name, label, error)
            if name not in runners:
                timing.release(device)
        times = timing.interleaved(
            runners,
            device,
            seconds=seconds,
            fails=lambda name, error, label=label: miss(name, label, error),
        )
        base = times.get(work.baseline_name)
        for name, t in times.items():
            row = row_of(case, mode, name, work, t, base)
            if name in found:
                size, method = _peak(case, where, name, mode, runners[name], device)
                row |= {
                    "peak_extra_bytes": size,
                    "memory_method": method,
                    "errors": found[name],
                    "within_bound": within_bound(found[name], found.get("torch", {})),
                    "lacks": case.contender(name).lacks,
                }
            rows.append(row)
            speed = f"{row['median_ms']:10.3f} ms  {row['rate']:9.4g} {row['unit']}"
            say(f"  {mode:18} {name:26} {speed}")
        for row in rows:  # last: a capture that fails may leave a stream behind
            if row["mode"] == mode != BOTH and row["median_ms"] < 1e3 * GRAPH_BELOW:
                replayed = timing.replayed(runners[row["contender"]], device)
                row["graph_ms"] = None if replayed is None else 1e3 * replayed
    return rows, absent


def _peak(
    case: Case,
    where: tuple[str, int],
    name: str,
    mode: str,
    fn: Callable[[], Any],
    device: torch.device,
) -> tuple[int | None, str]:
    if device.type == "cuda":
        return memory.on_gpu(fn), "CUDA caching allocator"
    size, index = where
    if size == "quick":
        return memory.here(fn) if CLEAR.exists() else None, "resident set, shared process"
    request = {"op": case.op, "size": size, "index": index, "contender": name, "mode": mode}
    request["threads"] = torch.get_num_threads()
    return memory.in_own_process(request), "resident set, own process"
