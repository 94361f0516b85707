"""Fused operations for reinforcement learning from human feedback. The whole API in one screen.

`gikernels.reference` is the executable specification; each operation's own file has the rest.
"""

from gikernels.dispatch import BackendStatus, BackendUnavailable, backends
from gikernels.experience import (
    experience,
    gae,
    kl_penalty,
    linear_experience,
    normalize_advantages,
)
from gikernels.groups import (
    group_advantages,
    group_stats,
    group_weights,
    merge_stats,
    soft_groups,
)
from gikernels.linear_logprobs import linear_logprobs
from gikernels.losses import difference_objective, ppo_loss, preference_loss, value_loss
from gikernels.meta import meta_ascent
from gikernels.partition import partition
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
    "difference_objective",
    "experience",
    "gae",
    "group_advantages",
    "group_stats",
    "group_weights",
    "kl_penalty",
    "linear_experience",
    "linear_logprobs",
    "merge_stats",
    "meta_ascent",
    "normalize_advantages",
    "partition",
    "ppo_loss",
    "preference_loss",
    "soft_groups",
    "value_loss",
]
