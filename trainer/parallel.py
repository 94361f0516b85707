"""What the loop asks of the other ranks. One process today; every sum over ranks is already here.

The loop never looks at the world's size. It takes its own share of the prompts, divides by
denominators that `all_sum` has made global, and asks `is_main()` before it writes or prints.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_sum(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Local sums in, their sum over the ranks out, not in place: gikernels' `reduce`."""
    if world_size() == 1:
        return x
    if isinstance(x, Tensor):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total
    return [all_sum(each) for each in x]


def all_gather(x: Tensor) -> Tensor:
    """(n) of each rank -> (n * ranks), in rank order; every rank has the same n."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def any_true(flag: bool) -> bool:
    """Whether it is true on some rank."""
    return bool(all_sum(torch.tensor(float(flag), device=device())))


def all_true(flag: bool) -> bool:
    return not any_true(not flag)


def gather_objects(x: object) -> list:
    """One small object of each rank, on every rank."""
    if world_size() == 1:
        return [x]
    out = [None] * world_size()
    torch.distributed.all_gather_object(out, x, group=cpu_group())
    return out


def barrier() -> None:
    """Wait until every rank is here."""
    gather_objects(None)


@functools.cache
def cpu_group():
    """For what is not on a GPU: small objects, checkpoints written in the background."""
    if world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo")


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def generator(*names: object) -> torch.Generator:
    """Randomness that depends on its names alone: generator(seed, "rollout", step).

    Nothing is drawn from a global stream, so a resumed run needs no saved generator state, and one
    more draw here does not shift all the draws there.
    """
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    """Compute in bfloat16 where the config says so; parameters stay in float32."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device().type, torch.bfloat16)


def peak_memory_bytes() -> int:
    """Of this process since its start: GPU memory where there is a GPU, else resident memory."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
