"""Several ranks, one result: what the loop asks of the others, and the mesh that they form.

Every rank knows the whole batch and computes on a share of its sequences. Models' outputs are put
together again (`all_sum` of parts that are zero elsewhere, which is exact), so whatever is derived
from them (advantages, groups, moments, weights, metrics) is the same plain code on every rank, and
the same on one. Gradients are sums over ranks, with denominators of the whole batch. So the number
of ranks changes the order of a sum, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from trainer.config import ConfigError

T = TypeVar("T")
MOMENT = timedelta(seconds=3)


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def describe() -> str:
    kind = torch.cuda.get_device_name() if device().type == "cuda" else "CPU"
    return f"{world_size()} x {kind}" if world_size() > 1 else kind


def is_main() -> bool:
    return rank() == 0


def start(timeout: float = 1800.0, first: Callable[[], None] | None = None) -> None:
    """Join the others, if torchrun started us; `timeout`: seconds until a collective is given up.

    `first` is done before, by one rank of each node; the others wait for as long as it takes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        # torchrun's store outlives a restart; the addresses of the ranks before are still in it.
        store, number, ranks = next(torch.distributed.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        if first is not None:
            _once_a_node(store, first)
        init_group(store, number, ranks, timeout)


def _once_a_node(store: torch.distributed.Store, do: Callable[[], None]) -> None:
    """What fails on one node is told to all ranks."""
    key, nodes = "before_the_group_{}", int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        problem = ""
        try:
            do()
        except Exception as error:
            problem = str(error) or type(error).__name__
            raise
        finally:
            store.set(key.format(os.environ.get("GROUP_RANK", "0")), problem)
    for node in range(nodes):
        while not store.check([key.format(node)]):
            time.sleep(0.1)
        if problem := store.get(key.format(node)).decode():
            raise ConfigError(problem)


def join_alone() -> None:
    """A group of one, where torchrun did not start us: FSDP2 asks for a group."""
    if not torch.distributed.is_initialized():
        init_group(torch.distributed.HashStore(), 0, 1)


def init_group(
    store: torch.distributed.Store, rank: int, ranks: int, timeout: float = 1800.0
) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=ranks
    )


def _timeout() -> timedelta:
    """Of the group of all. New groups have torch's own, NCCL's 10 minutes, unless they are told."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout


def _store() -> torch.distributed.Store | None:
    """What the ranks share beside their group; it outlives one of them that ends."""
    return None if world_size() == 1 else distributed_c10d._get_default_store()


def tell_failure(line: str) -> bool:
    """Leave for the others why this rank ends; returns whether it is this rank that should say so.

    What all ranks meet is said once, by rank 0. The others wait for its word a moment, and speak
    where it says something else or nothing.
    """
    store = _store()
    if store is None:  # before they have met: each node has files of its own
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store.compare_set("failure", "", f"{rank()} {line}")
        if is_main():
            store.set("failure of rank 0", line)
            with contextlib.suppress(RuntimeError):  # the store may end with this process
                store.wait([f"heard by {r}" for r in range(1, world_size())], MOMENT)
            return True
        store.wait(["failure of rank 0"], MOMENT)
        other = store.get("failure of rank 0").decode() != line
        store.set(f"heard by {rank()}", "")
        return other
    except (RuntimeError, ValueError):  # nobody is there any more
        return True


def first_failure() -> tuple[int, str] | None:
    """The rank that ended first, and why; None where it was killed, or nobody can say."""
    store = _store()
    try:
        if store is None or not store.check(["failure"]):
            return None
        number, _, line = store.get("failure").decode().partition(" ")
        return int(number), line
    except (RuntimeError, ValueError):
        return None


def stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        mesh.cache_clear()
        cpu_group.cache_clear()


def all_sum(x: Tensor) -> Tensor:
    """The sum over ranks, not in place."""
    if world_size() == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Of parameters that every rank has whole, in place and all at once; of shards FSDP does it."""
    if world_size() == 1:
        return
    ours = [p for p in parameters if not isinstance(p, DTensor)]
    if not ours:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours]
    there = torch.tensor([float(p.grad is not None) for p in ours], device=grads[0].device)
    flat = torch.cat([*(grad.flatten().float() for grad in grads), there])
    torch.distributed.all_reduce(flat)
    sums = flat.split([*(p.numel() for p in ours), len(ours)])
    for p, total, some in zip(ours, sums, sums[-1].tolist()):
        if some:  # on no rank: it stays without
            p.grad = total.view_as(p).to(p.dtype)


def all_ranks(x: Tensor) -> Tensor:
    """(ranks, ...): every rank's own."""
    if world_size() == 1:
        return x.unsqueeze(0)
    out = x.new_empty(world_size(), *x.shape)
    torch.distributed.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1))
    return out


def share(count: int) -> slice:
    """This rank's part of a row of things that cost about the same."""
    bounds = [count * r // world_size() for r in (rank(), rank() + 1)]
    return slice(*bounds)


def any_true(flag: bool) -> bool:
    """Whether it is true on some rank."""
    return bool(all_sum(torch.tensor(float(flag), device=device())))


def all_true(flag: bool) -> bool:
    return not any_true(not flag)


def gather_objects(x: T) -> list[T]:
    """One small object of each rank, on every rank."""
    if world_size() == 1:
        return [x]
    out: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(out, x, group=cpu_group())
    return out


def barrier() -> None:
    """Wait until every rank is here."""
    gather_objects(None)


@functools.cache
def cpu_group(use: str = "objects") -> torch.distributed.ProcessGroup | None:
    """For what is not on a GPU. Each thread has to have one of its own: small objects between
    steps, checkpoints that are written in the background."""
    if world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_timeout())


@functools.cache
def mesh(replicas: int) -> DeviceMesh:
    """(replicate, shard): each replica is spread over the ranks of one node, or of a few."""
    if world_size() % replicas:
        raise ConfigError(
            f"is {replicas}; want a divisor of the number of ranks, {world_size()}",
            "trainer.replicas",
        )
    shape: tuple[int, ...] = (replicas, world_size() // replicas)
    names: tuple[str, ...] = ("replicate", "shard")
    if replicas == 1:
        shape, names = shape[1:], names[1:]
    made = init_device_mesh(device().type, shape, mesh_dim_names=names)
    for name in names:
        distributed_c10d._set_pg_timeout(_timeout(), made.get_group(name))
    return made


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(p: Tensor) -> Tensor:
    """A sharded tensor put together; every rank has to ask."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def generator(*names: object) -> torch.Generator:
    """Randomness that depends on its names alone: generator(seed, "rollout", step).

    Nothing is drawn from a global stream, so a resumed run needs no saved generator state, and one
    more draw here does not shift all the draws there.
    """
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def peak_memory_bytes() -> int:
    """Of this process since its start: GPU memory where there is a GPU, else resident memory."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
