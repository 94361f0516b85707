"""What `import gikernels` does, and who may import whom."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gikernels

PACKAGE = Path(gikernels.__file__).parent

# From the ground up: a file may import what lies below its room, and in its room what its
# operation has and what all there share.
FLOORS = (
    "reference",
    "backends",
    "vocabulary",
    "sequence",
    "groups",
    "meta",
    "",  # gikernels itself: the public API
    "build",
    "selftest",
    "integrations",
)
OPERATIONS = {"vocabulary", "sequence", "groups"}
SHARED = {
    f"gikernels.vocabulary.{name}"
    for name in ("head", "tiles", "launch", "logit_rows", "totals", "formed", "split", "support")
}
COLLECTIVE = {"split.py"}
"""Where a group that was passed is used."""
COMPOSED = {
    # linear_experience is linear_logprobs and experience, one after the other.
    ("gikernels.sequence.experience", "gikernels.vocabulary.linear_logprobs"),
    # With a support or a split vocabulary the loss is that of linear_logprobs' results.
    ("gikernels.vocabulary.policy_loss", "gikernels.vocabulary.linear_logprobs_parts"),
}


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


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """Modules that a file imports, wherever in it: ours to the file, others to the top."""
    tree = ast.parse(path.read_text())
    types = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    types = [node for node in types if ast.unparse(node.test) == "TYPE_CHECKING"]
    quiet = {each for node in types for each in ast.walk(node)}  # never imported
    for node in ast.walk(tree):
        if node in quiet and "torch.distributed" in ast.unparse(node):
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            calls = "torch.distributed" in within and path.name not in COLLECTIVE
            assert not calls, f"{path.name}: no collective calls"
            found = [name if name in FILES else node.module for name in within]
        else:
            continue
        for name in found:
            calls = name.startswith("torch.distributed") and path.name not in COLLECTIVE
            assert not calls, f"{path.name}: no collective calls"
            yield name if name in FILES else name.partition(".")[0]


def room(name):
    return name.split(".")[1] if "." in name else ""


def operation(name):
    """X, X_torch, X_cpp, X_triton, ... are one operation."""
    return re.sub("_(torch|cpp|triton|kernels|ops|parts|terms|chunk|support)$", "", name)


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_one_way(name):
    """Downward between rooms; operations use what is shared, and never each other."""
    others = set(sys.stdlib_module_names) | {"torch", "triton"}
    for found in imports(FILES[name]):
        if found not in FILES:
            peers = room(name) == "integrations" and found not in ("trainer", "bench", "tests")
            assert found in others or peers, f"{name} imports {found}"
            continue
        mine, theirs = FLOORS.index(room(name)), FLOORS.index(room(found))
        assert theirs <= mine, f"{name} imports {found}, which lies above it"
        if room(name) in OPERATIONS and room(found) in OPERATIONS:
            fine = (
                found in SHARED or operation(found) == operation(name) or (name, found) in COMPOSED
            )
            assert fine, f"{name} imports {found}: another operation"


def test_no_circles():
    """Between files, an operation's halves among them: the graph can be sorted."""
    graph = {name: set(imports(path)) - {name} for name, path in FILES.items()}
    tuple(TopologicalSorter(graph).static_order())


def test_rooms_say_what_they_are_for():
    for path in PACKAGE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.parent.name} says nothing"


def test_files_can_be_read_in_one_sitting():
    for path in FILES.values():
        lines = len(path.read_text().splitlines())
        assert lines <= 450 or path.stem == "reference", f"{path.name}: {lines} lines"


def test_one_version_everywhere():
    root = PACKAGE.parent
    version = gikernels.__version__
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    changes = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == version and len(set(changes)) == len(changes)
