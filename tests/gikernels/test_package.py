"""What `import gikernels` does, and who may import whom."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gikernels

PACKAGE = Path(gikernels.__file__).parent

# What operations may share; everything else in the package is an operation.
SHARED = {"reference", "dispatch", "checks", "settings", "build", "head", "tiles", "grid"}


def run(code, **environment):
    """A fresh interpreter, which has imported torch and nothing of ours."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_quiet():
    """Adds 0.1 s to `import torch`: it loads nothing heavy, asks no GPU, starts no process."""
    code = """
import sys, subprocess, threading
import torch

def forbidden(*args, **kwargs):
    raise AssertionError("called on import")

for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, forbidden)
subprocess.Popen.__init__ = forbidden
threads, before = threading.active_count(), set(sys.modules)
import gikernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert threading.active_count() == threads
heavy = {"triton", "transformers", "numpy", "scipy", "pandas", "matplotlib", "trl", "datasets"}
assert not new & heavy, new & heavy
assert "trainer" not in new and "bench" not in new
"""
    assert run(code) == ""


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None   # import triton now raises ImportError
import importlib.abc, importlib.machinery, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch, gikernels
z = torch.randn(3, 7, requires_grad=True)
gikernels.logprobs(z, torch.tensor([0, 1, 2])).logprobs.sum().backward()
assert z.grad.any()
status = gikernels.backends()["triton"]
assert not status and "not installed" in status.reason
try:
    gikernels.logprobs(z, torch.tensor([0, 1, 2]), backend="triton")
except gikernels.BackendUnavailable as error:
    assert "triton" in str(error) and "pip install triton" in str(error)
else:
    raise AssertionError("a missing backend was accepted")
"""
    assert run(code, TRITON_INTERPRET="0") == ""


def test_all_is_the_whole_api():
    assert sorted(gikernels.__all__) == gikernels.__all__
    for name in gikernels.__all__:
        assert getattr(gikernels, name).__doc__, f"{name} has no docstring"


def imports(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def operation(module):
    """X, X_torch, X_cpp and X_triton are one operation."""
    return module.removesuffix("_torch").removesuffix("_cpp").removesuffix("_triton")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_arrows_point_one_way(path):
    """Operations use what is shared, and never each other."""
    standard, ours = set(sys.stdlib_module_names), {p.stem for p in PACKAGE.glob("*.py")}
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top in standard | {"torch", "triton", "gikernels"}, f"{path.name} imports {name}"
        assert not name.startswith("torch.distributed"), f"{path.name}: no collective calls"
        module = rest.partition(".")[0]
        if top == "gikernels" and module in ours - SHARED and path.stem != "__init__":
            assert operation(module) == operation(path.stem), f"{path.name} imports {name}"
