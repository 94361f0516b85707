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

MIB = 1 << 20

# By device type; "cuda" stands for every device that is not a CPU.
workspace_bytes = {"cpu": 32 * MIB, "cuda": 256 * MIB}


def workspace_for(device: torch.device) -> int:
    """Bytes that an operation may use there beside its inputs, outputs and gradients."""
    return workspace_bytes["cpu" if device.type == "cpu" else "cuda"]


@contextmanager
def workspace(size: int) -> Iterator[None]:
    """Bytes of workspace on every device inside the block. It is global, not per thread."""
    kept = dict(workspace_bytes)
    workspace_bytes.update(dict.fromkeys(kept, size))
    try:
        yield
    finally:
        workspace_bytes.update(kept)
