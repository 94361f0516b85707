"""One case: everybody's error against float64, then times of one interleaved run, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.host.process import CLEAR
from bench.ops import memory, timing
from bench.ops.calls import errors, runner, within_bound
from bench.ops.cases import BOTH, UNITS, Case
from bench.ops.peers import Contender


def _reason(error: BaseException) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return "out of memory"
    first = str(error).strip().split("\n")[0]
    return first if type(error).__name__ == "Absent" else f"{type(error).__name__}: {first}"[:300]


def measure(
    case: Case,
    where: tuple[str, int],  # size and index, for the memory of a process of its own
    device: torch.device,
    seconds: float,
    say: Callable[[str], None] = print,
) -> tuple[list[dict], list[dict]]:
    """Rows of figures, and who is absent and why."""
    rows: list[dict] = []
    absent: list[dict] = []

    def miss(contender: Contender, where: str, error: Exception) -> None:
        absent.append({"case": where, "contender": contender.name, "reason": _reason(error)})

    found: dict[str, dict[str, float]] = {}
    for contender in case.contenders:
        try:
            found[contender.name] = errors(case, contender, device)
        except Exception as error:
            miss(contender, case.label, error)
    inputs = case.inputs(case.shape, case.dtype, device)
    for mode, work in case.work.items():
        runners = {}
        for contender in case.contenders:
            if contender.name not in found or (mode == BOTH and contender.forward_only):
                continue
            fn = runner(case, contender, inputs, mode)
            try:
                fn()  # compiles, and shows who runs out of memory
                runners[contender.name] = fn
            except Exception as error:
                miss(contender, f"{case.label}, {mode}", error)
        baseline = work.baseline(inputs)
        baseline()
        everybody = {**runners, work.baseline_name: baseline}
        times = timing.interleaved(everybody, device, seconds=seconds)
        best = work.amount / times[work.baseline_name].median
        unit, scale = UNITS[work.unit]
        for name, t in times.items():
            rate = work.amount / t.median
            row = {
                "op": case.op,
                "shape": case.shape,
                "dtype": str(case.dtype).removeprefix("torch."),
                "mode": mode,
                "contender": name,
                "median_ms": 1e3 * t.median,
                "p20_ms": 1e3 * t.low,
                "p80_ms": 1e3 * t.high,
                "calls": t.calls,
                "rate": rate / scale,
                "unit": unit,
                "formula": work.formula,
                "fraction": rate / best,
                "fraction_of": work.baseline_name,
                "peak_extra_bytes": None,
                "memory_method": None,
                "errors": {},
                "within_bound": None,
                "lacks": "",
            }
            if name in runners:
                size, method = _peak(case, where, name, mode, runners[name], device)
                row |= {
                    "peak_extra_bytes": size,
                    "memory_method": method,
                    "errors": found[name],
                    "within_bound": within_bound(found[name], found.get("torch", {})),
                    "lacks": case.contender(name).lacks,
                }
            rows.append(row)
            say(f"  {mode:18} {name:26} {row['median_ms']:10.3f} ms  {row['rate']:9.4g} {unit}")
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
