"""Is it right on this machine? The selftest and the tests, each as a process of its own.

Nothing here imports torch: what runs beside the tests must not hold a part of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.record import FOLDER, STAGE, Missing, Record, Red, short
from bench.host.machine import ROOT

PROCESSES = {"triton": 12, "gpu": 4}  # those that only a GPU can run are few and large
ON_A_CPU = "group_stats and triton"  # interpreted, so as few as show that the stage works


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def selftest(record: Record, device: str) -> None:
    package = ROOT / "gikernels"
    if not any((package / p).exists() for p in ("selftest.py", "selftest/__main__.py")):
        raise Missing("gikernels.selftest is not in this checkout")
    command = [sys.executable, "-m", "gikernels.selftest", "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = short((done.stdout + done.stderr).strip())
    print(said, flush=True)
    record.save(code=done.returncode, says=said[-20000:])
    if done.returncode:
        raise Red(said.splitlines()[-1] if said else f"exit code {done.returncode}")


def triton(record: Record, device: str) -> None:
    """What launches a kernel of ours; the rest is the same on any machine."""
    chosen = "triton or cuda" if device == "cuda" else ON_A_CPU
    tests(record, device, ["tests/gikernels"], "not gpu and not vllm", chosen)


def gpu(record: Record, device: str) -> None:
    files = [p for p in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in p.read_text()]
    ours = [str(p.relative_to(ROOT)) for p in files]
    if not has("transformers"):
        ours = [p for p in ours if p.startswith("tests/gikernels")]
    tests(record, device, ours, "gpu", "not compute_sanitizer")


def tests(record: Record, device: str, paths: list[str], marker: str, chosen: str) -> None:
    if not has("pytest"):
        raise Missing("pytest is not installed")
    if not paths or not all((ROOT / path).exists() for path in paths):
        raise Missing("tests/ is not in this checkout")
    stage = record.data["stage"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.plugin", "-m", marker, "-k", chosen]
    command += ["--continue-on-collection-errors"]  # red all the same, but the others are run
    processes = min(PROCESSES[stage], os.cpu_count() or 1) if device == "cuda" else 1
    if has("xdist") and processes > 1:
        command += ["-n", str(processes)]
    environment = {
        **os.environ,
        FOLDER: str(record.path.parent),
        STAGE: stage,
        "OMP_NUM_THREADS": "1",
    }
    record.save(command=" ".join(["python", *command[1:], *paths]))
    code = subprocess.run([*command, *paths], cwd=ROOT, env=environment).returncode
    found = Record(Path(record.path.parent), stage).found  # the plugin has written there
    record.found.update(found)
    counts = found.get("counts", {})
    if code == 5 or not sum(counts.values()):  # pytest: nothing was collected
        raise Missing("no such test in this checkout")
    if counts["failed"]:
        first = found["failures"][0]["test"]
        raise Red(f"{counts['failed']} of {sum(counts.values())} tests: {first}")
    if code:
        raise RuntimeError(f"pytest ended with code {code}")
    if not counts["passed"]:
        raise Missing(f"all {counts['skipped']} tests were skipped")
