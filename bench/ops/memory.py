"""The peak of extra memory while a function runs: what was not there before and is needed at once.

On a GPU the caching allocator counts it. On a CPU the kernel's high-water mark of the resident set
is read, in a process of its own (`python -m bench.ops.memory REQUEST`) where freed memory has been
given back; or PyTorch's allocations are counted, which is the same in every run.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.host.process import CLEAR, resident
from bench.ops import calls, cases


def on_gpu(fn: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def here(fn: Callable[[], object]) -> int:
    """Of this very process: only right where little freed memory is lying about."""
    _give_back()
    before = resident("VmRSS")
    CLEAR.write_text("5")  # resets the high-water mark
    fn()
    return resident("VmHWM") - before


def counted(fn: Callable[[], object]) -> int:
    """Of PyTorch's own allocations on a CPU; what its libraries take beside them is not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fn()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = [e for e in results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in changes), default=0)


def in_own_process(request: dict) -> int | None:
    """Bytes; None where the system does not tell (no /proc) or the contender cannot run."""
    if not CLEAR.exists():
        return None
    command = [sys.executable, "-m", "bench.ops.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    case = cases.find(request["op"], request["size"], request["index"])
    contender = case.contender(request["contender"])
    device = torch.device("cpu")
    # A small run first: it loads libraries and starts threads, which is not the op's memory.
    calls.prepare(case, contender, case.check_shape, device, request["mode"])()
    fn = calls.prepare(case, contender, case.shape, device, request["mode"])
    print(here(fn))


if __name__ == "__main__":
    main()
