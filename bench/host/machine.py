"""The machine and the checkout that figures come from. Only naming a device needs torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "numpy")


def commit() -> str:
    """What GIKERNELS_COMMIT says, of a copy without its history; else that of the checkout."""
    if told := os.environ.get("GIKERNELS_COMMIT"):
        return told

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return "no-git"
    return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def with_path() -> dict[str, str]:
    """The environment of a process that is to find this checkout first and all else as before."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])])}


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found[1] if found else model
    return f"CPU {model}, {torch.get_num_threads()} threads"


def machine(device: torch.device) -> dict:
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {"device": device_name(device), "system": platform.platform(), "versions": versions}
