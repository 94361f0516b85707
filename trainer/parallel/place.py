"""How a finished model meets the machine: its device, its shards, its precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import Config
from trainer.parallel.ranks import device, is_main, mesh, world_size

M = TypeVar("M", bound=nn.Module)


def place(module: M, config: Config, offload: bool = False) -> M:
    """A finished model onto this rank's device, or with several ranks its shards (FSDP2).

    The model of rank 0 counts: its weights and buffers go to the others, which may have built
    theirs on the meta device. Buffers that no checkpoint holds, such as rotary frequencies, are
    among them: `to_empty` would leave them uninitialised without a word.
    """
    if config.model.compile:
        for block in blocks(module):
            block.compile()
    if world_size() == 1:
        return module.to(device())
    half = torch.bfloat16 if config.model.dtype == "bfloat16" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    home, rests = device(), OffloadPolicy()
    if offload:
        rests = CPUOffloadPolicy(pin_memory=home.type == "cuda")
        home = torch.device("cpu")

    def shard(part: nn.Module) -> None:
        fully_shard(
            part,
            mesh=mesh(config.trainer.replicas),
            reshard_after_forward=True,
            mp_policy=precision,
            offload_policy=rests,
        )

    weights = {name: p.detach() for name, p in module.named_parameters()} if is_main() else {}
    for block in blocks(module):
        shard(block)
    shard(module)
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
            assert isinstance(p, DTensor)
            p.copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None))
        for buffer in module.buffers():
            full = buffer.to(device())
            torch.distributed.broadcast(full, 0)
            buffer.copy_(full)
    return module


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of its transformers, which transformers never splits between devices."""
    parts = list(module.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in parts if type(part).__name__ in kinds]


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside, weights that belong to no block (embeddings, heads) may be used outside forward()."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    yield
    module.reshard()


def autocast(dtype: str) -> contextlib.AbstractContextManager:
    """Compute in bfloat16 where the config says so; parameters stay in float32."""
    if dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device().type, torch.bfloat16)
