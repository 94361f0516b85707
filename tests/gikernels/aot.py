"""Compiles every Triton kernel of gikernels for GPUs that need not be there, and prints a table.

    python -m tests.gikernels.aot [--json FILE] [--only TEXT] [--all]      (TRITON_INTERPRET unset)

Each module of gikernels with kernels has `aot_cases()`, or `aot_cases(arch)` where configurations
depend on the GPU (arch is 80, 90, ... or "gfx942"). It yields a dict for each variant worth
compiling: name, fn (the JITFunction), signature ({argument: type, "constexpr" for constants}),
constexprs, attrs (divisibility hints), and

    archs   of TARGETS (all)   where it is launched at all
    main    bool               whether a spilled register is a defect (for the first case of a
                               kernel, its default configuration, and not for the others)

Only first cases are compiled for the GPUs in FIRST_ONLY, and for sm_100 the others of modules that
choose their tiles by the GPU; two cores would need a minute for more. With --all, all are.

Whatever else it holds (num_warps, num_stages, maxnreg) are options of the compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
import time
from multiprocessing import get_context

from triton.backends.compiler import GPUTarget

from tests.gikernels.pretend import GPUS, modules

# Shared memory that one program may ask for, in bytes.
TARGETS = {f"sm_{arch}": (GPUTarget("cuda", arch, 32), has[0]) for arch, has in GPUS.items()}
TARGETS["gfx942"] = (GPUTarget("hip", "gfx942", 64), 64 << 10)
FIRST_ONLY = {"sm_80", "sm_89", "sm_120", "gfx942"}
KNOWN = {"name", "fn", "signature", "constexprs", "attrs", "archs", "main"}


def cases(target: str, every: bool = False) -> list[dict]:
    found: list[dict] = []
    for module in modules():
        if not hasattr(module, "aot_cases"):
            continue
        by_arch = inspect.signature(module.aot_cases).parameters
        made = module.aot_cases(TARGETS[target][0].arch) if by_arch else module.aot_cases()
        for case in made:
            first = all(case["fn"] is not other["fn"] for other in found)
            others = target == "sm_90" or (by_arch and target not in FIRST_ONLY)
            if target in case.get("archs", TARGETS) and (first or every or others):
                found.append({"main": first, **case})
    return found


def missing() -> list[str]:
    """Kernels without a case. A kernel is a JITFunction that no other JITFunction calls."""
    from triton.runtime.jit import JITFunction

    found = {
        f"{f.fn.__module__}.{f.fn.__qualname__}": f
        for m in modules()
        for f in vars(m).values()
        if isinstance(f, JITFunction)
    }
    called = {name for f in found.values() for name in f.fn.__code__.co_names if name != f.__name__}
    covered = {
        f"{case['fn'].fn.__module__}.{case['fn'].fn.__qualname__}"
        for t in TARGETS
        for case in cases(t)
    }
    return sorted(
        key for key, f in found.items() if key not in covered and f.__name__ not in called
    )


def compile_one(job: tuple[int, str, bool]) -> dict:
    import triton
    from triton.compiler import ASTSource

    index, arch, every = job
    case = cases(arch, every)[index]
    target, limit = TARGETS[arch]
    record = {
        "module": case["fn"].fn.__module__,
        "kernel": case["fn"].__name__,
        "case": case["name"],
        "arch": arch,
        "main": case["main"],
        "shared_limit": limit,
    }
    source = ASTSource(case["fn"], case["signature"], case["constexprs"], case["attrs"])
    options = {key: value for key, value in case.items() if key not in KNOWN}
    log, start = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=target, options=options)
    except Exception as error:
        return record | {"error": f"{type(error).__name__}: {error}"[-2000:]}
    code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]

    def logged(ptxas: str, amd: str) -> int | None:
        found = re.search(ptxas if target.backend == "cuda" else amd, log.getvalue() + code)
        return int(found[1]) if found else None

    return record | {
        "seconds": time.perf_counter() - start,
        "shared": kernel.metadata.shared,
        "registers": logged(r"Used (\d+) registers", r"\.vgpr_count:\s*(\d+)"),
        "spills": logged(r"(\d+) bytes spill stores", r"\.vgpr_spill_count:\s*(\d+)"),
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|global_load_dwordx4", code)),
        "tensor_cores": sorted(set(re.findall(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma", code))),
    }


def table(records: list[dict]) -> str:
    columns = (
        "module",
        "kernel",
        "case",
        "arch",
        "registers",
        "spills",
        "shared",
        "wide_loads",
        "seconds",
    )
    rows = [columns]
    for r in records:
        if "error" in r:
            rows.append((*(r[c] for c in columns[:4]), r["error"].replace("\n", " ")[:60]))
        else:
            cells = (r["seconds"] if c == "seconds" else r[c] for c in columns)
            rows.append(tuple(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="also write the records there")
    parser.add_argument("--only", default="", help="only cases with this in kernel or case name")
    parser.add_argument("--all", action="store_true", help="every case for every GPU")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    jobs = [
        (index, arch, args.all)
        for arch in TARGETS
        for index, case in enumerate(cases(arch, args.all))
        if args.only in f"{case['fn'].__name__} {case['name']}"
    ]
    # A fresh cache, or ptxas would not run and say nothing.
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1")
        with get_context("fork").Pool(2) as pool:
            records = pool.map(compile_one, jobs, chunksize=1)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"missing": missing(), "records": records}, file, indent=1)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
