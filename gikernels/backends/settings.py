"""The one setting of the vocabulary operations: how much scratch memory they may use.

    from gikernels.backends.settings import workspace_bytes
    workspace_bytes["cuda"] = 1 << 30           # for good
    with gikernels.workspace(1 << 30): ...      # for a block

More is a little faster; the results differ in rounding only. A workspace is never kept: it is
allocated inside a call and freed at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gikernels.backends import checks

MIB = 1 << 20

# Below this a chunk is a few hundred numbers: at 1 byte, 300 rows of 3000 tokens took minutes.
LEAST = 1 << 14

# By device type; "cuda" stands for every device that is not a CPU, and while it is not said here,
# the card decides.
workspace_bytes = {"cpu": 32 * MIB}


def workspace_for(device: torch.device) -> int:
    """Bytes that an operation may use there beside its inputs, outputs and gradients."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    if kind not in workspace_bytes:
        return _of_card(device)
    return checks.whole(f"workspace_bytes[{kind!r}]", workspace_bytes[kind], at_least=LEAST)


def _of_card(device: torch.device) -> int:
    """A dW of several chunks is read and written, in fp32, for each: 4.2 GB at 128256 x 4096, more
    time than the product of the 896 rows that fit into 256 MiB. A card of 80 GB has room for more.
    """
    if device.type != "cuda":
        return 256 * MIB
    large = torch.cuda.get_device_properties(device).total_memory >= 80 * 10**9
    return (1024 if large else 256) * MIB


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Bytes of workspace on every device inside the block, at least 16 KiB. It is global, not per
    thread."""
    checks.whole("size", size, at_least=LEAST)
    kept = dict(workspace_bytes)
    workspace_bytes.update(cpu=size, cuda=size)
    try:
        yield
    finally:
        workspace_bytes.clear()
        workspace_bytes.update(kept)
