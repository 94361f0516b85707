"""Which backend runs, and why.

`reference` is PyTorch in bounded chunks and runs everywhere; `triton` runs on a GPU, and under its
interpreter where the variable TRITON_INTERPRET=1 asks for it; `cuda` and `cpp` are csrc/, compiled
by `gikernels.build`. Nothing is probed before somebody asks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BACKENDS = ("reference", "triton", "cuda", "cpp")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, for dynamo cannot trace it


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot run here; the message says why."""


class KernelError(RuntimeError):
    """A kernel did not compile or launch; the message says how to do without it."""


class BackendStatus(NamedTuple):
    """True where the backend can run; `reason` says why not, or what it will use."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


Function = TypeVar("Function", bound=Callable[..., object])


def _constant(function: Function) -> Function:
    """torch.compile asks it once and does not look inside, where there is what it cannot trace. So
    does torch.compiler.assume_constant_result, which would import the compiler."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_constant
def interpreting() -> bool:
    """Triton reads the variable when a kernel is decorated: set it before the import."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton() -> BackendStatus:
    if not HAS_TRITON:
        return BackendStatus(False, "triton is not installed: pip install triton")
    if interpreting():
        return BackendStatus(True, "interpreted on the CPU (TRITON_INTERPRET=1): for tests, slow")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no GPU that this PyTorch can use (torch.cuda.is_available())")
    return BackendStatus(True, torch.cuda.get_device_name())


def _native(name: str) -> BackendStatus:
    from gikernels.backends import build  # here: it needs fcntl, which Windows has not

    return BackendStatus(*build.status(name))


def backend_status(name: str) -> BackendStatus:
    if name == "reference":
        return BackendStatus(True, "PyTorch, in chunks of bounded size, on any device")
    return _triton() if name == "triton" else _native(name)


@_constant
def _trouble(name: str) -> str:
    """Why the backend cannot run here; empty where it can."""
    status = backend_status(name)
    return "" if status else status.reason


def backends() -> dict[str, BackendStatus]:
    """What this machine has; for each missing backend, why. `bool(backends()["triton"])` works."""
    return {name: backend_status(name) for name in BACKENDS}


@_constant
def exact_fp32() -> bool:
    """Whether the user wants fp32 products of fp32 matrices, as PyTorch's default is, and not TF32.

    torch.get_float32_matmul_precision() raises where it was said by the newer attribute, which in
    turn knows what was said by the older functions.
    """
    return torch.backends.cuda.matmul.fp32_precision != "tf32"


def capturing(tensor: Tensor) -> bool:
    """Whether its stream is being captured into a CUDA graph: then nobody may wait for values."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


# Of operations that wait for the GPU, for a number of rows above all, or that keep counters for the
# next call, which must not lie in a graph's memory. With mode="reduce-overhead" torch.compile runs
# them between two graphs.
OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)


_preferred = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """What backend="auto" means inside the block, wherever an operation has it:

        with gikernels.backend("reference"): ...      # no Triton: PyTorch in chunks

    An operation that does not have this backend chooses as ever; a call that names one gets that.
    A gradient is computed by the backend of its forward, wherever backward() is called. It is
    global, not per thread.
    """
    global _preferred
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want 'auto' or one of {BACKENDS}")
    kept, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = kept


def choose(backend: str, tensor: Tensor, offers: tuple[str, ...]) -> str:
    """The backend that will run for `tensor`, of those that the operation offers, best first.

    "auto" takes the first offer that works where the tensor lives. A backend named by the caller
    is taken or refused, never replaced; so is one named by `with backend(name):`.
    """
    if backend == "auto" and _preferred in offers:
        backend = _preferred
    if backend == "auto":
        return next(name for name in offers if _suits(name, tensor))
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, want 'auto' or one of {offers}")
    if backend not in offers:
        raise BackendUnavailable(f"backend {backend!r}: not for this operation, which has {offers}")
    if trouble := _trouble(backend):
        raise BackendUnavailable(f"backend {backend!r} cannot run here: {trouble}")
    if backend in ("triton", "cuda") and not tensor.is_cuda and not _interpreted(backend):
        raise BackendUnavailable(f"backend {backend!r} wants CUDA tensors, got {tensor.device}")
    if backend == "cpp" and tensor.device.type != "cpu":
        raise BackendUnavailable(f"backend 'cpp' wants CPU tensors, got {tensor.device}")
    return backend


def _interpreted(backend: str) -> bool:
    return backend == "triton" and interpreting()


def _suits(name: str, tensor: Tensor) -> bool:
    """Whether "auto" takes it. The interpreter is never chosen, only asked for."""
    if name == "reference":
        return True
    on_its_device = tensor.device.type == ("cpu" if name == "cpp" else "cuda")
    return on_its_device and not _interpreted(name) and not _trouble(name)
