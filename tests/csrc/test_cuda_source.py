"""The CUDA kernels without a GPU: run on the CPU under emulation.h, and compiled by nvcc."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gikernels.backends import build

HERE = Path(__file__).parent
FLAGS = ["-O0", "-std=c++17", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}"]


def gpp() -> str:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return "g++"


@pytest.mark.parametrize(
    ("sanitizer", "problems"), [("address,undefined", 120), ("thread", 40)], ids=["memory", "races"]
)
@pytest.mark.slow
def test_the_kernels_give_the_cpus_bits(sanitizer, problems, tmp_path):
    """Values, ties, weights, min_size, bad rows; one CTA and the grid; shared memory or none left.

    Proved able to fail: the thread sanitiser found a missing barrier in Row::narrow.
    """
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe = [gpp(), *sanitize, str(empty), "-o", str(tmp_path / "empty")]
    if (
        subprocess.run(probe, capture_output=True).returncode
        or subprocess.run([tmp_path / "empty"], capture_output=True).returncode
    ):
        pytest.skip(f"g++ has no run time here for -fsanitize={sanitizer}")
    program = tmp_path / "compare"
    sources = [str(HERE / "compare.cpp"), str(build.CSRC / "partition.cpp")]
    compile_it = [gpp(), *FLAGS, "-DGI_SANITIZED", *sanitize, *sources, "-o", str(program)]
    done = subprocess.run(compile_it, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    done = subprocess.run([program, str(problems)], capture_output=True, text=True)
    assert done.stdout == f"{problems} problems agree\n", done.stdout + done.stderr[:8000]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Our kernels for four generations, without CUB (see without_cub.h), and what ptxas said."""
    try:
        nvcc = build.compiler("cuda")
    except build.BuildError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    command = [nvcc, *build.CUDA_FLAGS, "--resource-usage", f"-I{HERE}"]
    command += ['-DGI_PLATFORM="without_cub.h"', str(build.CSRC / "partition.cu")]
    command += ["-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120]", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_compile_and_fit(compiled):
    """One CTA has 1024 threads, so 64 registers each; shared memory below 48 KB needs no opt-in."""
    _, said = compiled
    report = re.findall(
        r"entry function '\S*?\d+([a-z_]+?)I([fd])E\S*' for '(sm_\d+)'.*?"
        r"(\d+) bytes spill stores.*?Used (\d+) registers(.*?)\n",
        said,
        re.DOTALL,
    )
    assert {arch for _, _, arch, *_ in report} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert len(report) == 4 * 2 * 10
    for kernel, dtype, arch, spilled, registers, rest in report:
        found = re.search(r"(\d+) bytes smem", rest)
        shared = int(found[1]) if found else 0
        print(f"{arch} {kernel}<{dtype}>: {registers} registers, {spilled} B spilled, {shared} B")
        assert int(registers) <= 64 and int(spilled) <= 128 and shared <= 16 << 10


@pytest.mark.slow
def test_a_machine_without_a_driver_gets_an_error_and_not_a_crash(compiled):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    loaded = ctypes.CDLL(str(compiled[0]))
    build._declare("cuda", loaded)
    assert loaded.gi_partition_cuda_workspace_f32(1, 100, 2, 0) > 0
    error = loaded.gi_partition_cuda_f32(*[None] * 2, 1, 100, 2, 1, *[None] * 5, None, None)
    assert error > 0
    assert b"CUDA" in loaded.gi_cuda_error(error)
