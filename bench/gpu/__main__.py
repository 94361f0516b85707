"""Is it right on this GPU, and how fast? Answers in order of worth, within so many minutes.

    python -m bench.gpu --minutes 15                  all stages
    python -m bench.gpu --minutes 4                   the first five, which matter most
    python -m bench.gpu --minutes 10 --only peers     one stage (or several, with commas)
    python -m bench.gpu --device cpu --minutes 2      tiny sizes: the machinery without a GPU

Works from a bare checkout: no installation, network, git or nvcc. The CUDA library of the partition
may be built elsewhere (`python -m gikernels.build --arch 90 --into DIR`) and handed over with
--library DIR; without it and without nvcc the partition runs in PyTorch.

Each stage is a process of its own with its own limit, and what it finds is written at once, so the
same command, after whatever has cut it, goes on with what is left. A stage whose limit does not fit
into what is left is not begun. Exit code: 0, 1 if a check is red or a stage has crashed, 2 if there
is no GPU or the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import record, runner, table
from bench.gpu.stages import STAGES, Stage, named
from bench.host.machine import ROOT, with_path

LIBRARIES = ROOT / "gikernels" / "lib"  # where gikernels.build looks first
PROBE = """
import json, torch
gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name() if gpu else ""
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": name}))
"""


class UsageError(Exception):
    """One line: why nothing has been begun."""


def probe() -> dict[str, Any]:
    """What PyTorch sees; in a process of its own, for this one is to hold no part of the GPU."""
    line = [sys.executable, "-c", PROBE]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UsageError(f"PyTorch does not start: {said[-1] if said else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """Without the interpreter, which the tests ask for by themselves."""
    return {name: value for name, value in with_path().items() if name != "TRITON_INTERPRET"}


def take_libraries(folder: Path) -> list[str]:
    """Into gikernels/lib, where they are found by a hash of the sources that they were built of."""
    files = sorted([*folder.glob("cuda-*.so"), *folder.glob("cpp-*.so")])
    if not files:
        raise UsageError(f"--library {folder}: no cuda-*.so or cpp-*.so there")
    try:
        LIBRARIES.mkdir(exist_ok=True)
        for file in files:
            target = LIBRARIES / file.name
            if file.resolve() != target.resolve():
                shutil.copy(file, target.with_suffix(".half"))
                os.replace(target.with_suffix(".half"), target)
    except OSError as error:
        raise UsageError(f"--library: cannot write to {LIBRARIES}: {error}") from error
    return [file.name for file in files]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=about, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("--minutes", type=float, default=15.0, help="in all (default 15)")
    parser.add_argument("--only", default="", metavar="STAGE[,STAGE]", help=f"of {names}")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: bench/results/gpu-NAME OF THE GPU"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--library", type=Path, metavar="DIR", help="libraries built elsewhere")
    parser.add_argument("--again", action="store_true", help="forget what these stages have found")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: want more than 0")
    try:
        args.stages = named(args.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return args


def main(
    argv: Sequence[str] | None = None,
    *,
    look: Callable[[], dict[str, Any]] = probe,
    start: runner.Start | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """The last three are for tests: what stands in for PyTorch, a stage's process and the time."""
    args, began = parse(argv), clock()
    try:
        return prove(args, look(), start, clock, began)
    except UsageError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.gpu: stopped; the same command goes on", file=sys.stderr)
        return 130


def prove(
    args: argparse.Namespace,
    seen: dict[str, Any],
    start: runner.Start | None,
    clock: Callable[[], float],
    began: float,
) -> int:
    if args.device == "cuda" and not seen["gpu"]:
        build = f"built for CUDA {seen['cuda']}" if seen["cuda"] else "built without CUDA"
        raise UsageError(
            f"no GPU that this PyTorch can use (torch {seen['torch']}, {build}); "
            "--device cpu runs tiny sizes, to test the machinery"
        )
    if args.library:
        print(f"libraries: {', '.join(take_libraries(args.library))}")
    gpu = args.device == "cuda"
    name = seen["gpu"] if gpu else "CPU"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = args.output or ROOT / ("bench/results" if gpu else "runs") / f"gpu-{slug}"
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: {error.strerror}") from error
    others = {data["device"] for data in table.load(folder).values()} - {name}
    if others:
        raise UsageError(f"--output {folder}: has results of {', '.join(others)}, not of {name}")
    if args.again:
        for stage in args.stages:
            (folder / f"{stage.name}.json").unlink(missing_ok=True)
    print(f"{name}, torch {seen['torch']}; {args.minutes:g} minutes, into {folder}", flush=True)

    def in_a_process(stage: Stage, limit: float) -> runner.Ending:
        line = [sys.executable, "-m", "bench.gpu.worker", stage.name, "--folder", str(folder)]
        line += ["--parent", str(os.getpid())]
        line += ["--device", args.device, "--limit", f"{limit:.0f}"]
        return runner.launch(line, limit, folder / f"{stage.name}.log", environment())

    records = runner.run(
        args.stages,
        folder,
        60 * args.minutes - (clock() - began),
        start or in_a_process,
        context={
            "sources": record.sources(),
            "device": name,
            "size": "gpu" if gpu else "quick",
        },
        clock=clock,
        say=lambda text: print(text, flush=True),
    )
    text = table.whole(table.load(folder))
    (folder / "table.md").write_text(text)
    print(f"\n{text}\n{folder / 'table.md'}")
    bad = (record.FAILED, record.CRASHED)
    return int(any(data["status"] in bad for data in records))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
