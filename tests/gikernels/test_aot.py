"""Every Triton kernel, compiled ahead of time for GPUs that are not there.

python -m tests.gikernels.aot        prints the table of registers, spills and shared memory
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from tests.gikernels.aot import TARGETS, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The compiler wants TRITON_INTERPRET unset before the kernels are decorated."""
    path = tmp_path_factory.mktemp("aot") / "records.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gikernels.aot", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_targets():
    assert TARGETS["sm_80"][0] == GPUTarget("cuda", 80, 32)
    assert TARGETS["sm_89"][0] == GPUTarget("cuda", 89, 32)
    assert TARGETS["sm_90"][0] == GPUTarget("cuda", 90, 32)
    assert TARGETS["sm_100"][0] == GPUTarget("cuda", 100, 32)
    assert TARGETS["sm_120"][0] == GPUTarget("cuda", 120, 32)
    assert TARGETS["gfx942"][0] == GPUTarget("hip", "gfx942", 64)


def test_every_kernel_compiles_for_every_gpu(compiled, capsys):
    with capsys.disabled():
        print("\n" + table(compiled["records"]))
    failed = [r for r in compiled["records"] if "error" in r]
    assert not failed, failed[0]["error"]
    assert {r["arch"] for r in compiled["records"]} == set(TARGETS)


def test_no_kernel_is_left_out(compiled):
    assert not compiled["missing"], "kernels without a case, or device functions that nobody calls"


def test_shared_memory_is_there(compiled):
    """The compiler does not look at the limit; a launch would fail."""
    for r in compiled["records"]:
        assert r["shared"] <= r["shared_limit"], r


def test_main_kernels_spill_nothing(compiled):
    for r in compiled["records"]:
        assert not r["main"] or r["spills"] == 0, r


def test_aligned_products_spill_nothing(compiled):
    """Proved able to fail: softcap, bias and temperatures spilled 324 bytes on sm_100."""
    ours = [r for r in compiled["records"] if "bf16" in r["case"] and "unaligned" not in r["case"]]
    ours = [r for r in ours if "linear_logprobs" in r["module"] or "policy_loss" in r["module"]]
    assert ours and all(r["spills"] == 0 for r in ours), [r for r in ours if r["spills"]]


def test_an_a100_has_three_stages_on_their_way(compiled):
    ours = [r for r in compiled["records"] if r["case"] == "forward_kernel_bf16"]
    assert [r["shared"] for r in ours if r["arch"] == "sm_80"] == [3 * 32 << 10]


def test_logits_are_read_16_bytes_at_a_time(compiled):
    """Forward from logits is a matter of bandwidth; narrower loads halve it."""
    module = "gikernels.vocabulary.logprobs_kernels"
    ours = [r for r in compiled["records"] if r["module"] == module]
    streaming = [r for r in ours if r["kernel"] in ("forward_kernel", "backward_kernel")]
    assert streaming and all(r["wide_loads"] for r in streaming)
