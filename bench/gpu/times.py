"""Times, memory and errors of the operations: ours beside plain PyTorch, then beside each peer.

A case is written when it is done. One that ended its process twice is not begun a third time, so
that a peer that crashes does not stand before those after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu import variants as tuning
from bench.gpu.record import Record, Red
from bench.ops import cases, measure, memory, timing
from bench.ops.calls import runner, upstream, with_leaves
from bench.ops.case import FORWARD, Case, Work
from bench.ops.peers import Contender

Result = tuple[list[dict], list[dict]]  # rows, and who is absent and why
TRIES = 2
OURS = ("gikernels", "torch")  # and what is plain beside it
LONGEST = 4096  # steps, of which plain PyTorch makes a few launches each
PIECES = "linear_logprobs in pieces"
HEAD, LATER, SMALL = 0, 1, 3  # of cases.HEADS["gpu"]: V 128256, V 131072, and D 896


def times(record: Record, device: str) -> None:
    """In order of worth. Errors of a head are those of all 8192 rows (bench/ops/truth.py)."""
    size, where = size_of(device), torch.device(device)
    head, loss = (pick(op, size, HEAD) for op in ("linear_logprobs", "linear_policy_loss"))
    todo: dict[str, Callable[[], Result]] = {
        head.label: partial(beside, head, size, HEAD, where),
        loss.label: partial(beside, loss, size, HEAD, where),
        f"{PIECES} {head.label}": partial(pieces, head, where),
    }
    for op, places in (
        ("linear_experience", (0,)),
        ("experience", (0, 1)),
        ("groups", (0, 1)),
        ("partition", (0, 1)),
        ("logprobs", (1, 2, 0)),
        ("group_advantages", (0,)),
        ("linear_logprobs_support", (0,)),
        ("linear_gather_logprobs", (0,)),
        ("linear_divergence", (0,)),
    ):
        there = list(cases.OPS[op](size))
        for place in places if len(there) > 1 else (0,):
            todo[there[place].label] = partial(beside, there[place], size, place, where)
    go_through(record, todo, where)


def small(record: Record, device: str) -> None:
    size, where = size_of(device), torch.device(device)
    todo = {}
    for op in ("linear_logprobs", "linear_policy_loss"):
        case = pick(op, size, SMALL)
        todo[case.label] = partial(beside, case, size, SMALL, where)
    go_through(record, todo, where)


def others(record: Record, device: str) -> None:
    """Each peer alone with ours and plain PyTorch: what one breaks, another does not miss."""
    size, where = size_of(device), torch.device(device)
    todo = {}
    for op, place in (("linear_logprobs", HEAD), ("linear_policy_loss", HEAD), ("logprobs", 1)):
        case, truths = pick(op, size, place), {}
        names = [c.name for c in case.contenders if c.name not in OURS]
        # Strongest first; what compiles for long, last.
        for name in sorted(names, key=lambda name: ("CuTe" not in name, "compile" in name)):
            todo[f"{case.label} beside {name}"] = partial(
                beside, case, size, place, where, peer=name, truths=truths
            )
    go_through(record, todo, where, ours="")


def variants(record: Record, device: str) -> None:
    """The forward of the large head in other tiles than its own."""
    size, where = size_of(device), torch.device(device)
    case = pick("linear_logprobs", size, HEAD)
    forward = dataclasses.replace(case, work={FORWARD: case.work[FORWARD]})
    todo = {}
    for name in tuning.VARIANTS:
        both = (case.contender("gikernels"), tuning.contender(name))
        todo[f"{case.label} {name}"] = partial(
            beside, dataclasses.replace(forward, contenders=both), size, HEAD, where, peer=name
        )
    go_through(record, todo, where, ours="")


def size_of(device: str) -> str:
    return "gpu" if device == "cuda" else "quick"


def pick(op: str, size: str, place: int) -> Case:
    there = list(cases.OPS[op](size))
    return there[place if place < len(there) else 0]


# --- the cases of a stage -----------------------------------------------------------------------


def go_through(
    record: Record,
    todo: dict[str, Callable[[], Result]],
    device: torch.device,
    ours: str = "gikernels",
) -> None:
    done = record.found.setdefault("cases", {})
    begun = record.found.setdefault("begun", {})
    for label, carry_out in todo.items():
        if label in done:
            continue
        begun[label] = begun.get(label, 0) + 1
        print(f"\n{label}", flush=True)
        if begun[label] > TRIES:
            rows, absent = [], [_absent(label, f"cut or crashed {TRIES} times")]
        else:
            record.save()
            rows, absent = _carry_out(label, carry_out, device)
        done[label] = {"rows": rows, "absent": absent}
        record.save()
    broken = [
        a["reason"]
        for each in done.values()
        for a in each["absent"]
        if ours and a["contender"] in (ours, "")
    ]
    if broken:
        raise Red(f"{len(broken)} of ours did not run, the first: {broken[0]}")


def _carry_out(label: str, carry_out: Callable[[], Result], device: torch.device) -> Result:
    try:
        rows, absent = carry_out()
    except Exception as error:
        rows, absent = [], [_absent(label, measure.reason(error))]
    timing.release(device)
    if device.type == "cuda":
        torch.cuda.synchronize()  # after an illegal access no result of this process is one
    return rows, absent


def _absent(label: str, reason: str, contender: str = "") -> dict[str, str]:
    return {"case": label, "contender": contender, "reason": reason}


def beside(
    case: Case,
    size: str,
    place: int,
    device: torch.device,
    peer: str = "",
    truths: dict[Any, Any] | None = None,
) -> Result:
    """Ours and plain PyTorch, and one peer: rows of all, and why the peer is not among them."""
    if peer:
        contender = case.contender(peer)
        try:
            with torch.no_grad():
                contender.run(case.inputs(case.shape, case.dtype, device))
        except Exception as error:
            return [], [_absent(case.label, measure.reason(error), peer)]
        finally:
            timing.release(device)
    names = (*OURS[: 1 if case.shape.get("T", 0) > LONGEST else 2], peer)
    case = dataclasses.replace(
        case, contenders=tuple(c for c in case.contenders if c.name in names)
    )
    return measure.measure(
        case,
        (size, place),
        device,
        0.4 if device.type == "cuda" else 0.02,
        truths={} if truths is None else truths,
    )


# --- the head in pieces -------------------------------------------------------------------------


def pieces(case: Case, device: torch.device) -> Result:
    """The three products of the head alone, and our passes one by one, in one interleaved run.

    The pass that makes dZ does not stand alone in the public interface: with W frozen the backward
    is dZ and dX, with h frozen dZ and dW, and with neither all three, so it is the first two less
    the third.
    """
    inputs = case.inputs(case.shape, case.dtype, device)
    h, w = inputs["hidden"], inputs["weight"]
    z = h @ w.T
    nvd = 2.0 * case.shape["N"] * case.shape["D"] * case.shape["V"]
    ours = case.contender("gikernels")
    entries: dict[str, tuple[str, Callable[[], Any], float]] = {
        "h W^T alone": (FORWARD, lambda: torch.mm(h, w.T, out=z), 1),
        "dZ W alone": ("backward", lambda: torch.mm(z, w), 1),
        "dZ^T h alone": ("backward", lambda: torch.mm(z.T, h), 1),
        "forward": (FORWARD, runner(case, ours, inputs, FORWARD), 1),
        "backward, dX": ("backward", _backward(case, ours, inputs, ("hidden",)), 2),
        "backward, dW": ("backward", _backward(case, ours, inputs, ("weight",)), 2),
        "backward, dX and dW": ("backward", _backward(case, ours, inputs, case.leaves), 3),
    }
    absent: list[dict] = []
    functions = {}
    for name, (_, call, _) in entries.items():
        try:
            call()
            functions[name] = call
        except Exception as error:
            absent.append(_absent(case.label, measure.reason(error), f"gikernels: {name}"))
    found = timing.interleaved(
        functions,
        device,
        seconds=0.4 if device.type == "cuda" else 0.02,
        fails=lambda name, e: absent.append(_absent(case.label, measure.reason(e), name)),
    )
    rows = []
    named = dataclasses.replace(case, op=PIECES)
    for name, t in found.items():
        mode, call, products = entries[name]
        work = Work(products * nvd, "FLOP", f"{2 * products:g} N D V", "", lambda _: lambda: None)
        row = measure.row_of(named, mode, name, work, t, None)
        if device.type == "cuda":
            row["peak_extra_bytes"] = memory.on_gpu(call)
            row["memory_method"] = "CUDA caching allocator"
        rows.append(row)
        print(f"  {name:26} {row['median_ms']:10.3f} ms  {row['rate']:9.4g} {row['unit']}")
    return rows, absent


def _backward(
    case: Case, contender: Contender, inputs: dict[str, Any], leaves: tuple[str, ...]
) -> Callable[[], Any]:
    """One backward after another through a graph that is kept, the other leaves frozen."""
    own = with_leaves(dataclasses.replace(case, leaves=leaves), inputs)
    outputs = list(contender.run(own).items())
    grads = upstream(dict(outputs))
    targets = [own[name] for name in leaves]
    return lambda: torch.autograd.grad([x for _, x in outputs], targets, grads, retain_graph=True)
