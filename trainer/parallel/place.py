"""How a finished model meets the machine: its device, its shards, its precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import Config
from trainer.parallel.ranks import device, is_main, join_alone, mesh, world_size

M = TypeVar("M", bound=nn.Module)


def shards(config: Config) -> bool:
    """Whether models are FSDP2's: always, but for float32 on one CPU, where the masters are what is
    computed with and there is nobody to share them with."""
    return world_size() > 1 or device().type == "cuda" or config.model.dtype != "float32"


def place(
    module: M, config: Config, offload: bool = False, beside: Iterable[nn.Parameter] = ()
) -> M:
    """A finished model onto this rank's device, as its shard (FSDP2): one path for one rank and for
    many.

    What is trained has masters in float32 and is computed with in model.dtype; a frozen model comes
    in that dtype. Small heads (`module.heads`) stay in float32. The model of rank 0 counts: its
    weights and buffers go to the others, which may have built theirs on the meta device. Buffers
    that no checkpoint holds, such as rotary frequencies, are among them: `to_empty` would leave
    them uninitialised without a word. `offload`: shards wait in the CPU's memory. `beside`: what
    every rank keeps whole, adapters on a frozen base; on one rank there is then nothing to shard.
    """
    if config.model.compile:
        for block in blocks(module):
            block.compile()
    kept = {*beside}
    if not shards(config) or (kept and world_size() == 1):
        return module.to(device())
    join_alone()
    home, rests = device(), OffloadPolicy()
    if offload:
        rests = CPUOffloadPolicy(pin_memory=home.type == "cuda")
        home = torch.device("cpu")

    def shard(part: nn.Module, dtype: torch.dtype | None) -> None:
        fully_shard(
            part,
            mesh=mesh(config.trainer.replicas),
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            offload_policy=rests,
            ignored_params=kept,
        )

    weights = {name: p.detach() for name, p in module.named_parameters()} if is_main() else {}
    compute = compute_dtype(config)
    for block in blocks(module):
        shard(block, compute)
    for head in heads(module):
        shard(head, torch.float32)
    shard(module, compute)
    if any(x.is_meta for x in [*module.parameters(), *module.buffers()]):
        module.to_empty(device=home)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # gradients are sums over ranks
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    with torch.no_grad():
        for name, p in module.named_parameters():
            full = (
                weights[name].to(device())
                if is_main()
                else torch.empty(p.shape, dtype=p.dtype, device=device())
            )
            torch.distributed.broadcast(full, 0)
            if isinstance(p, DTensor):
                full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(full)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                full = buffer.to(device())  # to stay, wherever the weights wait
                torch.distributed.broadcast(full, 0)
                part._buffers[name] = full
    return module


def from_main(parameters: Iterable[Tensor]) -> None:
    """Rank 0's, on all ranks."""
    if world_size() > 1:
        for p in parameters:
            torch.distributed.broadcast(p.detach(), 0)


def compute_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def heads(module: nn.Module) -> list[nn.Module]:
    """What a model of ours computes in float32 whatever its body is computed in."""
    found: list[nn.Module] = getattr(module, "heads", [])
    return found


def in_compute_dtype(module: M, config: Config) -> M:
    """The floating-point weights of a model that is not trained, but for its heads."""
    kept = {id(p) for head in heads(module) for p in head.parameters()}
    for p in module.parameters():
        if p.is_floating_point() and id(p) not in kept:
            p.data = p.data.to(compute_dtype(config))
    return module


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of its transformers, which transformers never splits between devices."""
    parts = list(module.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in parts if type(part).__name__ in kinds]


def deterministic() -> None:
    """No operation whose bits depend on which thread comes first, in this process. torch's own
    attention then takes its slower backward, flash-attn is asked for it where it is called, and
    what has no such form raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    flags: Any = torch.utils.deterministic
    flags.fill_uninitialized_memory = False  # nobody reads it


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside, weights that belong to no block (embeddings, heads) may be used outside forward()."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
