"""Fused operations for reinforcement learning from human feedback. The whole API in one screen.

`gikernels.reference` is the executable specification; each operation's own file has the rest.
"""

from gikernels.backends.dispatch import (
    BackendStatus,
    BackendUnavailable,
    KernelError,
    backend,
    backends,
)
from gikernels.backends.settings import workspace
from gikernels.groups.draw import GroupDraw
from gikernels.groups.partition import partition
from gikernels.groups.stats import (
    group_advantages,
    group_stats,
    group_weights,
    merge_stats,
    soft_groups,
)
from gikernels.meta import meta_ascent
from gikernels.reference import (
    Experience,
    Gae,
    GroupStats,
    LossOut,
    Partition,
    SoftGroups,
    Support,
    TokenStats,
)
from gikernels.sequence.experience import (
    experience,
    gae,
    kl_penalty,
    linear_experience,
    normalize_advantages,
)
from gikernels.sequence.losses import (
    cispo_loss,
    difference_objective,
    gspo_loss,
    ppo_loss,
    preference_loss,
    value_loss,
)
from gikernels.vocabulary.divergence import linear_divergence
from gikernels.vocabulary.gather_logprobs import linear_gather_logprobs
from gikernels.vocabulary.linear_logprobs import linear_logprobs
from gikernels.vocabulary.logprobs import logprobs
from gikernels.vocabulary.policy_loss import linear_policy_loss

__version__ = "0.2.0"

__all__ = [
    "BackendStatus",
    "BackendUnavailable",
    "Experience",
    "Gae",
    "GroupDraw",
    "GroupStats",
    "KernelError",
    "LossOut",
    "Partition",
    "SoftGroups",
    "Support",
    "TokenStats",
    "backend",
    "backends",
    "cispo_loss",
    "difference_objective",
    "experience",
    "gae",
    "group_advantages",
    "group_stats",
    "group_weights",
    "gspo_loss",
    "kl_penalty",
    "linear_divergence",
    "linear_experience",
    "linear_gather_logprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs",
    "merge_stats",
    "meta_ascent",
    "normalize_advantages",
    "partition",
    "ppo_loss",
    "preference_loss",
    "soft_groups",
    "value_loss",
    "workspace",
]
