"""How the programs of one Triton launch hand over to each other, so that a merge needs no second.

A 64-bit counter in global memory has two halves: arrivals below, rounds above. Of P programs one
adds 2^32 - (P - 1) and the others 1, so the last arrival, whichever it is, carries into the upper
half and leaves the lower one at zero: the counter is ready for the next round, and the next launch,
without being cleared. Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gikernels.backends import dispatch


@triton.jit
def arrive(counter, program, programs):
    """Announce that this program is done. Returns the round it arrived in, and whether it is last.

    What any program stored before its own arrival is visible to whoever arrives, or waits, later.
    """
    tl.debug_barrier()  # one thread does the atomic: the others must have stored by then
    carry = (1 << 32) - (programs.to(tl.int64) - 1)
    amount = tl.where(program == 0, carry, 1)
    before = tl.atomic_add(counter, amount, sem="acq_rel")
    return before >> 32, (before + amount) >> 32 != before >> 32


@triton.jit
def wait(counter, arrived_in):
    """Spin until all have arrived. Only where all programs are resident: a cooperative launch."""
    nothing = arrived_in * 0
    while tl.atomic_add(counter, nothing, sem="acquire") >> 32 == arrived_in:
        pass
    tl.debug_barrier()


SLOTS = 1024
_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """SLOTS counters at zero. Launches on one stream follow each other, so they share them.

    A captured graph may be replayed beside other work and gets counters of its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(SLOTS, dtype=torch.int64, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(SLOTS, dtype=torch.int64, device=device)
    return _counters[key]


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensors. What goes wrong
    there is no fault of the caller, who is told how to go on."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise dispatch.KernelError(
            f"a Triton kernel of gikernels did not compile or launch here ({_here(device)}): "
            f"{type(error).__name__}: {str(error).strip()[-500:]}\n"
            'To go on without it, in PyTorch: with gikernels.backend("reference"): ... or the '
            'argument backend="reference". python -m gikernels.selftest tells what works here.'
        ) from error


def _here(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"


def aot_case(
    fn: Any, name: str, types: dict[str, str], constexprs: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """What triton.compile(ASTSource(...)) wants. Unless `types` says otherwise, arguments are fp32
    pointers, or int32 where the name is in capitals or that of a stride; multiples of 16, where a
    launch would tell the compiler."""
    signature, attrs = {}, {}
    for i, arg in enumerate(fn.arg_names):
        if arg in constexprs:
            signature[arg] = "constexpr"
            continue
        integer = arg.isupper() or arg.endswith(("_s", "_t")) or arg in ("n", "ignore_index")
        signature[arg] = types.get(arg, "i32" if integer else "*fp32")
        if signature[arg] not in ("fp32", "fp64") and not fn.params[i].do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return {
        "name": name,
        "fn": fn,
        "signature": signature,
        "constexprs": constexprs,
        "attrs": attrs,
        "num_warps": 4,
        "num_stages": 3,
        **options,
    }
