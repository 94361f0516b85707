"""Fused operations for reinforcement learning from human feedback. The whole API in one screen.

`gikernels.reference` is the executable specification; each operation's own file has the rest.
"""

from gikernels.dispatch import BackendStatus, BackendUnavailable, backends
from gikernels.linear_logprobs import linear_logprobs
from gikernels.logprobs import logprobs
from gikernels.policy_loss import linear_policy_loss
from gikernels.reference import (
    Experience,
    Gae,
    GroupStats,
    LossOut,
    Partition,
    SoftGroups,
    TokenStats,
)

__all__ = [
    "BackendStatus",
    "BackendUnavailable",
    "Experience",
    "Gae",
    "GroupStats",
    "LossOut",
    "Partition",
    "SoftGroups",
    "TokenStats",
    "backends",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs",
]
