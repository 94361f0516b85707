"""gikernels inside other people's trainers. Nothing here is imported by `import gikernels`.

- `patch_lm_head`: any Hugging Face causal LM returns log-probabilities instead of logits
- `GroupInvariance`: weights and KL coefficients from scores, for any trainer's advantages
- `GroupSampler`: prompts drawn by group, for any data loader: rewards in, next prompts out
- `gikernels.integrations.trl`, `.verl`, `.openrlhf`: see docs/integrations.md
"""

from gikernels.integrations.huggingface import LmHeadPatch, LogProbOutput, patch_lm_head
from gikernels.integrations.invariance import GroupInvariance, InferredGroups
from gikernels.integrations.sampler import Drawing, GroupSampler

__all__ = [
    "Drawing",
    "GroupInvariance",
    "GroupSampler",
    "InferredGroups",
    "LmHeadPatch",
    "LogProbOutput",
    "patch_lm_head",
]
