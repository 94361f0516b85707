"""Versions of everything that decides a figure, and what this GPU can do at most: a bf16 product
and a copy. Every speed is a fraction of one of the two."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

import gikernels
from bench.gpu.record import Record, short
from bench.host.machine import commit, machine
from bench.ops import timing

ALSO = (
    *("transformers", "accelerate", "datasets", "pytest", "pytest-xdist", "hypothesis"),
    *("nvidia-cutlass-dsl", "apache-tvm-ffi"),
)


def run(record: Record, device: str) -> None:
    where = torch.device(device)
    about = machine(where)
    for name in ALSO:
        try:
            about["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_bytes"] = properties.total_memory
    record.save(machine=about, commit=commit())
    record.save(**ceilings(where))
    # Last, for it may compile what the package does not bring.
    record.save(
        backends={name: [bool(s), short(s.reason)] for name, s in gikernels.backends().items()}
    )


def ceilings(device: torch.device) -> dict[str, float]:
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (256, torch.float32)
    size = 1 << (30 if gpu else 22)  # bytes, read and written once each
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = timing.interleaved(calls, device, seconds=0.5 if gpu else 0.05)
    return {
        "product_size": n,
        "product_tflops": 2 * n**3 / times["product"].median / 1e12,
        "copy_tb_per_s": 2 * size / times["copy"].median / 1e12,
    }
