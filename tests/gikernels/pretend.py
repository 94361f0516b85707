"""A GPU that is not there: tensors and a Triton driver that say otherwise, up to the launch."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What a GPU has: shared memory of a program in bytes, and multiprocessors.
GPUS = {
    80: (163 << 10, 108),
    89: (99 << 10, 128),
    90: (227 << 10, 132),
    100: (227 << 10, 148),
    120: (99 << 10, 170),
}
ROOMS = ("backends", "groups", "sequence", "vocabulary")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class OnGpu(TorchFunctionMode):
    """Every tensor says that it is on a GPU, and what is asked of a GPU is done on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == Tensor.device.__get__:
            return CUDA
        if func == Tensor.is_cuda.__get__:
            return True
        args = tuple(CPU if x == CUDA else x for x in args) if _names_device(args) else args
        kwargs = {k: CPU if k == "device" else v for k, v in (kwargs or {}).items()}
        wide = kwargs.pop("out_dtype", None)  # 16-bit products into fp32: cuBLAS has them
        if wide is not None:
            args = tuple(x.to(wide) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **kwargs)


def _names_device(args: tuple) -> bool:
    return any(isinstance(x, torch.device) and x.type == "cuda" for x in args)


class Driver:
    """What triton.runtime asks of a driver. Each architecture is a device of its own."""

    def __init__(self) -> None:
        self.arch = 90
        self.launches: list[dict[str, Any]] = []
        self.compiled: list[str] = []
        self.launcher_cls = self.launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda arch: {"max_shared_mem": GPUS[arch][0]},
            load_binary=lambda *args: (object(), object(), 0, 0, 1024),
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def launcher(self, source, metadata) -> Callable:
        """What Triton makes once for each kernel that it compiles, and calls for each launch."""
        self.compiled.append(source.fn.__name__)

        def launch(x, y, z, stream, function, packed, *others) -> None:
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"grid {x, y, z}"
            if metadata.launch_cooperative_grid:  # all programs have to be resident
                registers = metadata.maxnreg * 32 * metadata.num_warps
                shared, processors = GPUS[self.arch]
                fit = min(65536 // registers, shared // max(1, metadata.shared))
                assert x * y * z <= fit * processors, f"{x * y * z} programs cannot be resident"
            self.launches.append({"kernel": source.fn.__name__, "shared": metadata.shared})

        return launch


@contextlib.contextmanager
def pretending(driver: Driver) -> Iterator[None]:
    """Until its end there is a GPU of driver.arch, and ptxas, which takes half the time, is idle:
    tests/gikernels/aot.py has it assemble every kernel."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    _implement_on_the_pretended_gpu()
    properties = SimpleNamespace(multi_processor_count=0, total_memory=80 << 30)

    def properties_of(device=None):
        properties.multi_processor_count = GPUS[driver.arch][1]
        return properties

    stream = SimpleNamespace(cuda_stream=0)
    of_cuda = {
        "is_available": lambda: True,
        "get_device_name": lambda *args: f"a pretended sm_{driver.arch}",
        "get_device_capability": lambda *args: divmod(driver.arch, 10),
        "get_device_properties": properties_of,
        "current_stream": lambda *args: stream,
        "is_current_stream_capturing": lambda: False,
        "device": lambda *args: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, fake in of_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda *args: b""))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(driver)
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        stack.enter_context(OnGpu())
        yield


_implemented: set[str] = set()


def _implement_on_the_pretended_gpu() -> None:
    """A mode is off inside the functions it has seen: each op turns it on again for itself."""

    def wrapped(implementation: Callable) -> Callable:
        def on_gpu(*args):
            with OnGpu():
                return implementation(*args)

        return on_gpu

    for module in modules():
        for value in list(vars(module).values()):
            if isinstance(value, torch.library.CustomOpDef) and value._qualname not in _implemented:
                _implemented.add(value._qualname)
                value.register_kernel("cpu", wrapped(value._init_fn))


def modules() -> list:
    import gikernels

    top = Path(gikernels.__file__).parent
    return [
        importlib.import_module(f"gikernels.{room}.{found.name}")
        for room in ROOMS
        for found in pkgutil.iter_modules([str(top / room)])
    ]
