"""Runs every launcher of gikernels up to the launch, for GPUs that need not be there.

    python -m tests.gikernels.dry_run [--json FILE] [--only TEXT] [--all]   (TRITON_INTERPRET unset)

The interpreter never compiles, and ahead-of-time signatures are written by hand. Here the public
functions get tensors that pretend to lie on a GPU, and Triton a driver that pretends to be one: the
real launchers bind their arguments, Triton specialises on them (an integer that is 1 becomes a
constant), builds descriptors, compiles, and compares shared memory with the GPU's. The launch
itself does nothing, so results are whatever was in memory.

Sizes and options are combined so that each value of each axis occurs; on sm_90 only, where the
shape of a kernel's tiles is the same everywhere. With --all every pair of values occurs on every
architecture: seven minutes of one core.

Then sizes change as they do from step to step: nothing may be compiled again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.gikernels.pretend import GPUS, Driver, pretending

# --- what is run --------------------------------------------------------------------------------

SIZES = (1, 16, 129, 897)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BOTH = (False, True)


def some_kept(N, V):
    """A support of every second row."""
    import gikernels

    lengths = torch.arange(N) % 2
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return gikernels.Support(ends, torch.arange(int(ends[-1])) % V)


def of_head(N, V, some, bias, softcap, temperatures):
    """The keywords that all operations on a head have."""
    return {
        "temperature": torch.rand(N) + 1 if temperatures else 0.7,
        "bias": some(V) if bias else None,
        "softcap": 30.0 if softcap else None,
        "backend": "triton",
    }


def linear(N, V, D, dtype, bias, softcap, ref, temperatures, frozen, kept=False):
    import gikernels

    def some(*shape):
        return torch.randn(shape).to(dtype).requires_grad_(not frozen or shape == (N, D))

    hidden, weight = some(N, D), some(V, D)
    stats = gikernels.linear_logprobs(
        hidden,
        weight,
        torch.randint(V, (N,)),
        ref=(some(N, D).detach(), some(V, D).detach()) if ref else None,
        support=some_kept(N, V) if kept else None,
        **of_head(N, V, some, bias, softcap, temperatures),
    )
    sum(x.sum() for x in stats if x is not None).backward()


def policy(N, kept, active, V, D, dtype, bias, softcap, temperatures, workspace, forward):
    import gikernels
    from gikernels.vocabulary import policy_loss_triton

    def some(*shape):
        return torch.randn(shape).to(dtype).requires_grad_(not forward)

    def active_rows(slope, recipe):  # of values that no kernel has written
        return torch.arange(len(slope))[-min(active, len(slope)) :]

    mask = torch.arange(N) < kept
    with (
        mock.patch.object(policy_loss_triton, "active_rows", active_rows),
        gikernels.workspace(workspace),
    ):
        loss = gikernels.linear_policy_loss(
            some(N, D),
            some(V, D),
            torch.randint(V, (N,)),
            torch.randn(N),
            torch.randn(N),
            mask=mask,
            denom=float(N),
            ref_logprobs=torch.randn(N),
            kl_coef=0.1,
            **of_head(N, V, some, bias, softcap, temperatures),
        ).loss
    if not forward:
        loss.backward()


def gather(N, K, V, D, dtype, bias, softcap, temperatures, workspace):
    import gikernels

    def some(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    with gikernels.workspace(workspace):
        gikernels.linear_gather_logprobs(
            some(N, D),
            some(V, D),
            torch.randint(V, (N, K)),
            **of_head(N, V, some, bias, softcap, temperatures),
        ).sum().backward()


def divergence(N, kept, V, D, dtype, kind, bias, softcap, temperatures, workspace, forward):
    import gikernels

    def some(*shape):
        return torch.randn(shape).to(dtype).requires_grad_(not forward)

    with gikernels.workspace(workspace):
        loss = gikernels.linear_divergence(
            some(N, D),
            some(V, D),
            (some(N, D).detach(), some(V, D).detach()),
            kind=kind,
            mask=torch.arange(N) < kept,
            denom=float(N),
            **of_head(N, V, some, bias, softcap, temperatures),
        ).loss
    if not forward:
        loss.backward()


def logits(N, V, dtype, softcap, ref, temperatures, strided, kept=False):
    import gikernels

    def some():
        return torch.randn(N, 2 * V).to(dtype)[:, ::2] if strided else torch.randn(N, V).to(dtype)

    z = some().requires_grad_()
    stats = gikernels.logprobs(
        z,
        torch.randint(V, (N,)),
        torch.rand(N) + 1 if temperatures else 0.7,
        softcap=30.0 if softcap else None,
        ref_logits=some() if ref else None,
        support=some_kept(N, V) if kept else None,
        backend="triton",
    )
    sum(x.sum() for x in stats if x is not None).backward()


def gae(S, T, dtype, last, strided):
    import gikernels

    def some():
        return torch.randn(T, S).to(dtype).T if strided else torch.randn(S, T).to(dtype)

    last_values = torch.randn(S) if last else None
    gikernels.gae(some(), some(), some() > 0, last_values=last_values, backend="triton")


def sequences(S, T, G, dtype, norm, critic, estimator, coefs):
    import gikernels

    def some():
        return torch.randn(S, T).to(dtype)

    gikernels.experience(
        some(),
        some(),
        some() if critic else None,
        torch.randn(S),
        some() > 0,
        torch.rand(S) if coefs else 0.1,
        estimator=estimator,
        norm=norm,
        group_ids=torch.randint(G, (S,)),
        num_groups=G,
        backend="triton",
    )


def flat(S, N, G, norm, critic, exact):
    import gikernels

    ends = torch.arange(S + 1) * N // S
    hidden, weight = torch.randn(N, 16), torch.randn(32, 16)
    gikernels.linear_experience(
        hidden,
        weight,
        torch.randint(32, (N,)),
        ends,
        torch.randn(N),
        torch.randn(N) if critic else None,
        torch.randn(S),
        0.1,
        ref=(hidden, weight) if exact else None,
        estimator="exact" if exact else "k1",
        norm=norm,
        group_ids=torch.randint(G, (S,)),
        num_groups=G,
        backend="triton",
    )


def normalize(S, T, G, ids):
    import gikernels

    x = torch.randn(S, T)
    group_ids = torch.randint(G, (S,)) if ids else None
    moments = torch.rand(G if ids else 1, 3)
    gikernels.normalize_advantages(x, x > 0, moments, group_ids, backend="triton")


def stats(n, K, dtype, weighted):
    import gikernels

    x = torch.randn(n).to(dtype)
    weights = torch.rand(n) if weighted else None
    gikernels.group_stats(x, torch.randint(K, (n,)), K, weights=weights, backend="triton")


NORMS = ("none", "batch", "group")
SMALL, LARGE = 1 << 18, 1 << 26  # workspaces: many chunks of rows, and one
AXES: dict[Callable, dict[str, tuple]] = {
    policy: {
        "N": (897, 129, 16),
        "kept": (897, 1, 16, 129),
        "active": (897, 1, 129),
        "V": SIZES,
        "D": (64, 1, 129),
        "dtype": FLOATS,
        "bias": BOTH,
        "softcap": BOTH,
        "temperatures": BOTH,
        "workspace": (LARGE, SMALL),
        "forward": BOTH,
    },
    linear: {
        "N": SIZES,
        "V": SIZES,
        "D": (64, 1, 129),
        "dtype": FLOATS,
        "bias": BOTH,
        "softcap": BOTH,
        "ref": BOTH,
        "temperatures": BOTH,
        "frozen": BOTH,
        "kept": BOTH,
    },
    gather: {
        "N": SIZES,
        "K": (5, 1, 16, 300),
        "V": (*SIZES, 5000),
        "D": (64, 1, 129),
        "dtype": FLOATS,
        "bias": BOTH,
        "softcap": BOTH,
        "temperatures": BOTH,
        "workspace": (LARGE, SMALL),
    },
    divergence: {
        "N": (897, 129, 16),
        "kept": (897, 1, 16, 129),
        "V": (*SIZES, 5000),
        "D": (64, 1, 129),
        "dtype": FLOATS,
        "kind": ("reverse", "forward", "jsd"),
        "bias": BOTH,
        "softcap": BOTH,
        "temperatures": BOTH,
        "workspace": (LARGE, SMALL),
        "forward": BOTH,
    },
    logits: {
        "N": SIZES,
        "V": (*SIZES, 65536),
        "dtype": FLOATS,
        "softcap": BOTH,
        "ref": BOTH,
        "temperatures": BOTH,
        "strided": BOTH,
        "kept": BOTH,
    },
    gae: {"S": SIZES, "T": SIZES, "dtype": FLOATS, "last": BOTH, "strided": BOTH},
    sequences: {
        "S": SIZES,
        "T": SIZES,
        "G": SIZES,
        "dtype": (torch.float32, torch.bfloat16),
        "norm": NORMS,
        "critic": BOTH,
        "estimator": ("k1", "k2", "k3"),
        "coefs": BOTH,
    },
    flat: {"S": SIZES, "N": SIZES, "G": SIZES, "norm": NORMS, "critic": BOTH, "exact": BOTH},
    normalize: {"S": SIZES, "T": SIZES, "G": SIZES, "ids": BOTH},
    stats: {"n": (*SIZES, 1 << 20), "K": (*SIZES, 1 << 16), "dtype": FLOATS, "weighted": BOTH},
}


def covering(axes: dict[str, tuple], pairs: bool) -> list[dict[str, Any]]:
    """Few combinations in which every value, or every pair of values of two axes, occurs."""
    size = 2 if pairs else 1
    lengths = [len(values) for values in axes.values()]
    left: set = set()
    for places in itertools.combinations(range(len(lengths)), size):
        for values in itertools.product(*(range(lengths[p]) for p in places)):
            left.add(tuple(zip(places, values)))

    def met(row: dict[int, int]) -> int:
        return sum(some in left for some in itertools.combinations(sorted(row.items()), size))

    rows: list[tuple[int, ...]] = []
    while left:
        row: dict[int, int] = dict(min(left))
        for axis in set(range(len(lengths))) - set(row):
            # Of equals one that moves on from row to row, or all axes would move together.
            turn = len(rows) % lengths[axis]
            order = [*range(turn, lengths[axis]), *range(turn)]
            row[axis] = max(order, key=lambda value, axis=axis, row=row: met({**row, axis: value}))
        rows.append(tuple(row[axis] for axis in range(len(lengths))))
        left -= set(itertools.combinations(enumerate(rows[-1]), size))
    return [{name: axes[name][i] for name, i in zip(axes, row)} for row in rows]


# What changes from step to step of a training run, the rest staying as it is.
STEADY: list[tuple[Callable, dict[str, Any], dict[str, tuple]]] = [
    (
        linear,
        {"V": 897, "D": 64, "dtype": torch.bfloat16, "bias": True, "softcap": False, "ref": True}
        | {"temperatures": True, "frozen": False},
        {"N": (100, 1, 16, 129, 4096)},
    ),
    (
        policy,
        {"N": 897, "active": 897, "V": 897, "D": 64, "dtype": torch.bfloat16, "bias": False}
        | {"softcap": False, "temperatures": False, "workspace": LARGE, "forward": False},
        {"kept": (100, 1, 16, 129, 897)},
    ),
    (
        gather,
        {"V": 897, "D": 64, "dtype": torch.bfloat16, "bias": True, "softcap": False}
        | {"temperatures": True, "workspace": LARGE},
        {"N": (100, 1, 16, 129, 4096), "K": (5, 6, 8)},
    ),
    (
        divergence,
        {"N": 897, "V": 897, "D": 64, "dtype": torch.bfloat16, "kind": "jsd", "bias": False}
        | {"softcap": False, "temperatures": False, "workspace": LARGE, "forward": False},
        {"kept": (100, 1, 16, 129, 897)},
    ),
    (
        logits,  # enough rows to fill a GPU: fewer are cut into parts, in powers of two
        {"V": 897, "dtype": torch.bfloat16, "softcap": False, "ref": True, "temperatures": False}
        | {"strided": False},
        {"N": (600, 601, 1024, 1025)},
    ),
    (
        gae,
        {"dtype": torch.float32, "last": True, "strided": False},
        {"S": (100, 1, 16, 129), "T": (33, 48, 64)},
    ),
    (
        sequences,
        {"G": 4, "dtype": torch.float32, "norm": "group", "critic": True, "estimator": "k1"}
        | {"coefs": True},
        {"S": (100, 1, 16, 129), "T": (33, 48, 64)},
    ),
    (normalize, {"ids": True, "T": 33}, {"S": (100, 1, 16), "G": (4, 1, 16)}),
    (stats, {"dtype": torch.float32, "weighted": True}, {"n": (8192, 8193), "K": (65, 80, 897)}),
]


def compiled_again(driver: Driver) -> list[str]:
    """Kernels that a change of sizes compiled once more."""
    again = []
    for run, fixed, varied in STEADY:
        names: set[str] = set()
        for values in itertools.product(*varied.values()):
            case = fixed | dict(zip(varied, values))
            driver.compiled = []
            record = attempt(driver, 90, run, case)
            again += [record["error"]] if "error" in record else []
            if names and driver.compiled:
                again.append(f"{driver.compiled} in {described(run, case)}")
            names |= {launch["kernel"] for launch in driver.launches}
    return again


def described(run: Callable, case: dict[str, Any]) -> str:
    words = (f"{k}={str(v).removeprefix('torch.')}" for k, v in case.items())
    return f"{run.__name__} {' '.join(words)}"


def jobs(every: bool, only: str) -> Iterator[tuple[int, Callable, dict[str, Any]]]:
    for arch in GPUS:
        for run, axes in AXES.items():
            by_arch = run in (policy, linear)  # their tiles are shaped by it
            if not (by_arch or arch == 90 or every):
                continue
            for case in covering(axes, pairs=every or (run is policy and arch == 90)):
                if only in f"sm_{arch} {described(run, case)}":
                    yield arch, run, case


def attempt(driver: Driver, arch: int, run: Callable, case: dict[str, Any]) -> dict[str, Any]:
    """What came of one call: its launches, or the error."""
    driver.arch, driver.launches = arch, []
    record = {"arch": arch, "op": run.__name__, "case": described(run, case)}
    start = time.process_time()
    torch.manual_seed(0)
    try:
        with pretending(driver):
            run(**case)
        record["launches"] = driver.launches
    except Exception as raised:
        error, where = raised, traceback.extract_tb(raised.__traceback__)[-1]
        while error.__cause__ is not None:  # from the caller's line in a kernel to what is wrong
            error = error.__cause__
        record["error"] = f"{type(error).__name__}: {error} ({where.name})"[-1000:]
    return {**record, "seconds": round(time.process_time() - start, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="also write the records there")
    parser.add_argument("--only", default="", help="only cases with this text, such as sm_90")
    parser.add_argument("--all", action="store_true", help="every pair of values on every GPU")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels are not launched")
    driver, records = Driver(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch, run, case in jobs(args.all, args.only):
            records.append(attempt(driver, arch, run, case))
            if "error" in records[-1]:
                print(f"sm_{arch} {records[-1]['case']}\n    {records[-1]['error']}")
        again = [] if args.only else compiled_again(driver)
    for line in again:
        print(f"compiled again: {line}")
    if args.json:
        Path(args.json).write_text(json.dumps({"records": records, "again": again}, indent=1))
    seconds = sum(r["seconds"] for r in records)
    failed = sum("error" in r for r in records)
    print(f"{len(records)} calls in {seconds:.0f} s, {failed} failed")
    return int(failed > 0 or len(again) > 0)


if __name__ == "__main__":
    sys.exit(main())
