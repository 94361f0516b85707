"""How much of a GPU's arithmetic a step has used (MFU): the models' operations by the card's peak.

A token costs 2 operations a weight on the way forward, 2 more for gradients of activations and 2
for the gradient of a weight that is trained. Attention's own products, recomputed activations and
padding do not count: what the card does for them is not what was asked for.
"""

from __future__ import annotations

import torch
from torch import nn

from trainer import parallel

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Operations a second in bfloat16, with sums in float32 and no sparsity, by NVIDIA's data sheets.
The first name that is in a card's name counts."""


def peak(card: str) -> float | None:
    words = card.replace("-", " ").split()
    for name, operations in PEAKS.items():
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return operations
    return None


def peak_here(dtype: str) -> float | None:
    """Of this rank's GPU; None on a CPU, for a card that is not in the list, and in float32."""
    device = parallel.device()
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return peak(torch.cuda.get_device_name(device))


def forward(model: nn.Module | None) -> float:
    """Operations a token."""
    return 2.0 * sum(_weights(model))


def training(model: nn.Module | None) -> float:
    """Operations a token, forward and backward."""
    frozen, trained = _weights(model)
    return 4.0 * frozen + 6.0 * trained


def _weights(model: nn.Module | None) -> tuple[int, int]:
    """Frozen and trained ones that tokens are multiplied by: embeddings are looked up, unless they
    are the head's as well."""
    if model is None:
        return 0, 0
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    looked_up -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    used = [weight for weight in model.parameters() if id(weight) not in looked_up]
    trained = sum(weight.numel() for weight in used if weight.requires_grad)
    return sum(weight.numel() for weight in used) - trained, trained


def mfu(operations: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Share of the peak of all ranks; None where there is nothing to compare with."""
    if peak is None or not operations:
        return None
    return operations * tokens_per_second / (peak * parallel.world_size())
