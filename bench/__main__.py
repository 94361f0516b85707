"""Everything about speed, in one command.

    python -m bench                      all ops at the sizes of this machine
    python -m bench --only logprobs      one op (or several, with commas)
    python -m bench --quick              a smoke run of a minute, anywhere

First the tests of each op run (on a GPU those marked gpu too): while one is red, no
speed is reported. Then every case of bench/ops/cases.py is measured beside its peers in one
interleaved run: median, 20 % and 80 % of the time, TFLOP/s or GB/s by a stated formula, the
fraction of the plain matrix products or of a plain copy measured in the same run, peak extra
memory, and the error against float64. Peers that are not installed or cannot run here are listed
with the reason.

Written to bench/results/DATE-DEVICE-COMMIT.{json,csv,md,png};
`python -m bench.ops.report FILE.json` prints the table again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.host.machine import ROOT, commit, machine, with_path
from bench.ops import cases, measure, report, timing


def tests_are_green(paths: list[str], on_gpu: bool) -> bool:
    """Runs pytest on them; on a CPU Triton's kernels are interpreted."""
    marker = "not vllm" if on_gpu else "not gpu and not vllm"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker]
    if importlib.util.find_spec("hypothesis") is None:
        command += ["-p", "bench.gpu.plugin"]  # which skips its tests
    return subprocess.run([*command, *paths], cwd=ROOT, env=with_path()).returncode == 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m bench", description=about, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", metavar="OP[,OP]", help=f"of {', '.join(cases.OPS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a smoke run")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--seconds", type=float, default=None,
        help="of timing for each contender and mode (default 2, with --quick 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--tests", nargs="+", metavar="PATH",
        help="run these tests before, in place of those of the ops that are measured",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    args = parser.parse_args(argv)
    args.ops = args.only.split(",") if args.only else list(cases.OPS)
    for op in args.ops:
        if op not in cases.OPS:
            parser.error(f"--only: no op {op!r}, there are {', '.join(cases.OPS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    has_gpu = torch.cuda.is_available()
    device = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
    size = "quick" if args.quick else "gpu" if device.type == "cuda" else "cpu"
    wanted = dict.fromkeys(path for path in map(cases.TESTS.get, args.ops) if path)
    paths = args.tests or [path for path in wanted if (ROOT / path).exists()]
    print(f"Tests first: {' '.join(paths)}", flush=True)
    if paths and importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: no tests, and so no speed.", file=sys.stderr)
        return 2
    if paths and not tests_are_green(paths, device.type == "cuda"):
        print("A test is red: no speed is reported.", file=sys.stderr)
        return 1
    if device.type == "cpu":
        # A plain run must not meet the interpreter, which the tests have just used.
        os.environ.pop("TRITON_INTERPRET", None)
    seconds = args.seconds if args.seconds is not None else 0.1 if args.quick else 2.0
    with timing.threads(args.threads):
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "machine": machine(device),
            "size": size,
            "tests": "green: " + " ".join(paths) if paths else "none there yet",
            "rows": [],
            "absent": [],
        }
        slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
        stem = args.output / f"{results['date']}-{slug}-{results['commit']}"
        args.output.mkdir(parents=True, exist_ok=True)
        for op in args.ops:
            for index, case in enumerate(cases.OPS[op](size)):
                print(f"\n{case.label}", flush=True)
                rows, absent = measure.measure(case, (size, index), device, seconds)
                results["rows"] += rows
                results["absent"] += absent
                # After each case, so that a crash or a time limit loses nothing that was measured.
                write(results, stem)
    print("\n" + report.markdown(results))
    print(f"Written to {stem}.{{json,csv,md,png}}")
    return 0


def write(results: dict, stem: Path) -> None:
    def path(kind: str) -> Path:
        return stem.with_name(f"{stem.name}.{kind}")

    path("json").write_text(json.dumps(results, indent=1) + "\n")
    path("md").write_text(report.markdown(results))
    report.write_csv(results, path("csv"))
    if results["rows"]:
        try:
            report.plot(results, path("png"))
        except ImportError:
            print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
