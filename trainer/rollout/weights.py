"""A policy's weights on their way into another engine: whole, in its dtype, a bucket at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import revert_weight_conversion

from trainer import parallel
from trainer.models.backbone import frozen, plain_name, with_adapter
from trainer.models.policy import Policy


def whole_weights(
    policy: Policy, dtype: torch.dtype, bucket: int, adapter: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name as in the model's checkpoint files, whole tensor) of every weight, tied ones once,
    with an adapter in them, or none.

    Sharded ones are gathered together until they come to `bucket` bytes; a larger one goes alone.
    Every rank has to walk through all of it. A bucket is freed when its tensors are.
    """
    for named in buckets(frozen(policy.model, adapter), dtype, bucket):
        names, parameters = zip(*named)
        tensors = gather([p.detach() for p in parameters], dtype)
        whole = {
            plain_name(name): with_adapter(policy.model, name, tensor, adapter)
            for name, tensor in zip(names, tensors)
        }
        del parameters, tensors
        # transformers keeps some weights in another form than the files, experts above all
        yield from revert_weight_conversion(policy.model, whole).items()
        del whole  # before the next bucket is gathered


def buckets(
    named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """In order, as many together as fit into `limit` bytes of `dtype`, and at least one."""
    inside: list[tuple[str, Tensor]] = []
    size = 0
    for name, p in named:
        bytes_ = p.numel() * dtype.itemsize
        if inside and size + bytes_ > limit:
            yield inside
            inside, size = [], 0
        inside.append((name, p))
        size += bytes_
    yield inside


def gather(parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Whole tensors in `dtype`, by one collective for all that are sharded alike."""
    if not isinstance(parameters[0], DTensor):
        return [p.to(dtype) for p in parameters]
    shards = [p for p in parameters if isinstance(p, DTensor)]
    assert len(shards) == len(parameters)
    mesh = shards[0].device_mesh
    for p in shards:
        assert p.device_mesh == mesh and p.placements[-1] == Shard(0)
        assert all(not isinstance(place, Shard) for place in p.placements[:-1])
    ranks = mesh.size(-1)
    # As fully_shard cuts: ranks get ceil(rows / ranks) rows each, the last ones fewer or none.
    most = [-(-p.shape[0] // ranks) for p in parameters]
    sizes = [rows * p.shape[1:].numel() for rows, p in zip(most, parameters)]
    ours = torch.empty(sum(sizes), dtype=dtype, device=parallel.device())
    for part, p in zip(ours.split(sizes), shards):
        local = p.to_local()
        part[: local.numel()].copy_(local.reshape(-1))
    everyone = ours.new_empty(ranks, len(ours))
    torch.distributed.all_gather_into_tensor(
        everyone.view(-1), ours, group=mesh.get_group(mesh.ndim - 1)
    )
    return [
        part.reshape(-1, *p.shape[1:])[: p.shape[0]]
        for part, p in zip(everyone.split(sizes, dim=1), parameters)
    ]
