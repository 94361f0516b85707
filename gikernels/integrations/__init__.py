"""gikernels inside other people's trainers. Nothing here is imported by `import gikernels`.

- `patch_lm_head`: any Hugging Face causal LM returns log-probabilities instead of logits
- `GroupInvariance`: weights and KL coefficients from scores, for any trainer's advantages
- `gikernels.integrations.trl`, `.verl`, `.openrlhf`: see docs/integrations.md
"""

from gikernels.integrations.huggingface import LmHeadPatch, LogProbOutput, patch_lm_head
from gikernels.integrations.invariance import GroupInvariance, InferredGroups

__all__ = [
    "GroupInvariance",
    "InferredGroups",
    "LmHeadPatch",
    "LogProbOutput",
    "patch_lm_head",
]
