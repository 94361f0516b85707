"""Compiles csrc/ for this machine on first use, once, and loads it.

    python -m gikernels.build                        what a first use would build, now
    python -m gikernels.build --arch 80,90 --into gikernels/lib     libraries to ship in a wheel

A library is looked for in gikernels/lib, where a wheel may bring it and no compiler is needed,
then in the cache ($GIKERNELS_CACHE, else $XDG_CACHE_HOME/gikernels, else ~/.cache/gikernels), whose
file names hold a hash of sources, flags and compiler. What is missing is compiled into the cache,
under a lock, and moved to its name when whole: processes that race get one library and never half.
One that was cut or changed since is built again, as to load it could end the process; one that
belongs to another user is not loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CSRC = PACKAGE / "csrc"  # in a checkout a link to the csrc/ beside the package
SHIPPED = PACKAGE / "lib"
SOURCES = {"cpp": ("partition.cpp", "experience.cpp", "stats.cpp"), "cuda": ("partition.cu",)}

# No contraction into FMA: the CPU and the GPU then compute the same bits. No -march=native either:
# the code has clones for wide vectors, picked when it is loaded, so a library runs on any machine.
CPP_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")
CUDA_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-fmad=false"),
    *("-cudart", "static", "-Wno-deprecated-gpu-targets"),
)


class BuildError(RuntimeError):
    """Why there is no library: what is missing, or what the compiler said."""


def status(name: str) -> tuple[bool, str]:
    """Whether the compiled backend `name` ("cpp" or "cuda") can run here, and why not.

    Builds it where that has not been done yet: seconds for "cpp", up to half a minute for "cuda".
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        return False, "no GPU that this PyTorch can use (torch.cuda.is_available())"
    found = _load(name)
    return (False, found) if isinstance(found, str) else (True, found._name)


def library(name: str) -> ctypes.CDLL:
    found = _load(name)
    if isinstance(found, str):
        raise BuildError(found)
    return found


_one_at_a_time = threading.Lock()


def _load(name: str) -> ctypes.CDLL | str:
    """The library, or why there is none; decided once in a process."""
    with _one_at_a_time:
        return _load_once(name)


@functools.cache
def _load_once(name: str) -> ctypes.CDLL | str:
    archs = present_archs() if name == "cuda" else ()
    why = []
    # One that was shipped may be for another C library: then it is built here.
    for find in (shipped, build):
        try:
            path = find(name, archs)
            if path is None:
                continue
            loaded = ctypes.CDLL(str(path))
            _declare(name, loaded)
            return loaded
        except (BuildError, OSError, AttributeError) as error:
            why.append(str(error))
    return "; ".join(why)


def _declare(name: str, loaded: ctypes.CDLL) -> None:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    results = [pointer] * 5  # group_ids, thresholds, centers, between, status
    for suffix in ("f32", "f64"):
        if name == "cpp":
            solve = getattr(loaded, f"gi_partition_cpu_{suffix}")
            solve.argtypes = [pointer, pointer, int64, int64, int32, int32, int32, *results]
            getattr(loaded, f"gi_sort_cpu_{suffix}").argtypes = [pointer, int64, int32, pointer]
            run, real = getattr(loaded, f"gi_experience_cpu_{suffix}"), ctypes.c_double
            run.argtypes = [pointer, int64, int32, *[pointer] * 8, int64, real, real, real, int32]
            run.argtypes += [pointer] * 6
            run.restype = None
            stats = getattr(loaded, f"gi_group_stats_cpu_{suffix}")
            stats.argtypes = [*[pointer] * 3, int64, int64, int32, *[pointer] * 3]
        else:
            solve = getattr(loaded, f"gi_partition_cuda_{suffix}")
            solve.argtypes = [pointer, pointer, int64, int32, int32, int32, *results]
            solve.argtypes += [pointer, pointer]  # workspace, stream
            workspace = getattr(loaded, f"gi_partition_cuda_workspace_{suffix}")
            workspace.argtypes, workspace.restype = [int64, int32, int32, int32], int64
    if name == "cuda":
        loaded.gi_cuda_error.restype = ctypes.c_char_p


# --- where things are -----------------------------------------------------------------------------


def cache_dir() -> Path:
    if chosen := os.environ.get("GIKERNELS_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gikernels"
    except RuntimeError as error:  # neither HOME nor an entry in passwd
        raise BuildError(f"no place for a cache: {error}; set GIKERNELS_CACHE") from error


def present_archs() -> tuple[int, ...]:
    """Compute capabilities of this machine's GPUs, 90 for 9.0, ascending."""
    import torch  # not above: setup.py runs this file where there is none

    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return tuple(sorted({10 * major + minor for major, minor in capabilities}))


def shipped(name: str, archs: tuple[int, ...]) -> Path | None:
    """A library of these very sources that came with the package and serves all of `archs`."""
    for path in sorted(SHIPPED.glob(f"{name}-{_hash(*_recipe(name))}*.so")):
        has = [int(arch) for arch in re.findall(r"-sm(\d+)", path.name)]
        if all(any(h // 10 == arch // 10 and h <= arch for h in has) for arch in archs):
            return path
    return None


def compiler(name: str) -> str:
    if name == "cpp":
        if chosen := os.environ.get("CXX"):
            if found := shutil.which(chosen):
                return found
            raise BuildError(f"no C++ compiler: CXX={chosen} is not found")
        for candidate in ("g++", "c++", "clang++"):
            if found := shutil.which(candidate):
                return found
        raise BuildError("no C++ compiler: install g++ (or clang++), or set CXX")
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(f"{toolkit}/bin/nvcc")
    if not found:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDACXX or CUDA_HOME")
    return found


# --- building -------------------------------------------------------------------------------------


def _recipe(name: str) -> list[bytes]:
    """What decides what a library computes, whichever compiler makes it."""
    flags = CPP_FLAGS if name == "cpp" else CUDA_FLAGS
    headers = sorted(path.name for path in CSRC.glob("*.h"))
    sources = [(CSRC / file).read_bytes() for file in (*headers, *SOURCES[name])]
    return [" ".join(flags).encode(), *sources]


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def command(name: str, archs: tuple[int, ...], output: str | Path) -> list[str]:
    flags = list(CPP_FLAGS if name == "cpp" else CUDA_FLAGS)
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        compiler(name),
        *flags,
        *(str(CSRC / file) for file in SOURCES[name]),
        "-o",
        str(output),
    ]


def build(name: str, archs: tuple[int, ...] = (), into: Path | None = None) -> Path:
    """The library's path in the cache, compiled unless it is there; or, compiled, in `into`."""
    suffix = "".join(f"-sm{arch}" for arch in archs)
    if into is not None:
        folder, key = into, _hash(*_recipe(name))
    else:
        version = subprocess.run([compiler(name), "--version"], capture_output=True, check=False)
        folder, key = cache_dir(), _hash(*_recipe(name), version.stdout)
    target = folder / f"{name}-{key}{suffix}.so"
    try:
        if into is None and _whole(target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing is truncated, and no link of somebody else's followed.
        how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        lock = os.open(folder / f"{target.stem}.lock", how, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if into is not None or not _whole(target):
                _compile(name, archs, target, marked=into is None)
        finally:
            os.close(lock)
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error}; set GIKERNELS_CACHE") from error
    return target


def _compile(name: str, archs: tuple[int, ...], target: Path, marked: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        half = Path(scratch) / target.name
        run = command(name, archs, half)
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr + done.stdout).strip()
            raise BuildError(f"{' '.join(run)} failed with code {done.returncode}:\n{said[-4000:]}")
        if marked:
            with half.open("ab") as file:  # the loader does not look behind the last section
                file.write(_end_of(half.read_bytes()))
        os.replace(half, target)


MARK = b"gikernels"


def _end_of(content: bytes) -> bytes:
    return MARK + zlib.crc32(content).to_bytes(4, "big")


def _whole(path: Path) -> bool:
    """Whether it is what was compiled: its end says so."""
    if not path.exists():
        return False
    if path.stat().st_uid not in (0, os.getuid()):
        raise BuildError(f"{path} belongs to another user: set GIKERNELS_CACHE")
    content, size = path.read_bytes(), len(MARK) + 4
    return len(content) > size and content[-size:] == _end_of(content[:-size])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gikernels.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", default="", help="build CUDA for these, such as 80,90,100,120")
    parser.add_argument("--into", type=Path, help="a folder, instead of the cache")
    options = parser.parse_args()
    archs = tuple(sorted(int(arch) for arch in options.arch.split(",") if arch))
    archs = archs or present_archs()
    failed = False
    for name in ("cpp", "cuda"):
        if name == "cuda" and not archs:
            print("cuda: no GPU here; name what to build for with --arch")
            continue
        try:
            print(f"{name}: {build(name, archs if name == 'cuda' else (), options.into)}")
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    return int(failed)
