"""Every launcher, run up to its launch for GPUs that are not there.

python -m tests.gikernels.dry_run --all        every pair of sizes and options on every architecture
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.gikernels.dry_run import AXES, covering
from tests.gikernels.pretend import GPUS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The compiler wants TRITON_INTERPRET unset before the kernels are decorated."""
    path = tmp_path_factory.mktemp("dry") / "run.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gikernels.dry_run", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_launch_compiles_and_fits(run):
    """Proved able to fail: a chunk of one row did not compile in linear_policy_loss."""
    failed = [r for r in run["records"] if "error" in r]
    assert not failed, f"sm_{failed[0]['arch']} {failed[0]['case']}: {failed[0]['error']}"
    assert {r["arch"] for r in run["records"]} == set(GPUS)
    assert all(r["launches"] for r in run["records"])


@pytest.mark.slow
def test_sizes_that_change_compile_nothing_again(run):
    assert not run["again"]


def test_combinations_cover_what_they_should():
    for axes in AXES.values():
        for pairs in (False, True):
            rows = covering(axes, pairs)
            for a, x in axes.items():
                assert {row[a] for row in rows} == set(x)
                for b, y in axes.items():
                    if pairs and a < b:
                        assert len({(row[a], row[b]) for row in rows}) == len(x) * len(y)
