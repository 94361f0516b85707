"""Group-invariant weights on any trainer's advantages: scores in, a weight a sequence out."""

import torch

from gikernels import group_advantages
from gikernels.integrations import GroupInvariance

PROMPTS, SAMPLES, KL_COEF = 6, 4, 0.05


def main() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    # What your trainer has: a score for each of SAMPLES answers to each of PROMPTS prompts.
    # Comparable across prompts! Subtract each prompt's mean reference score if they are not.
    difficulty = torch.tensor([0.9, 0.85, 0.2, 0.8, 0.3, 0.9])
    scores = (difficulty.unsqueeze(1) + 0.1 * torch.randn(PROMPTS, SAMPLES)).flatten()
    prompt = torch.arange(PROMPTS).repeat_interleave(SAMPLES)

    advantages = group_advantages(scores, prompt, PROMPTS)  # GRPO's

    # Three lines: prompts fall into two groups by how well they are done; the hard group weighs
    # more, and keeps a tenth of the KL coefficient.
    groups = GroupInvariance(beta=0.25).infer(scores, prompt)
    weighted = advantages * groups.weights
    kl_coef = KL_COEF * groups.kl_scale

    for p in range(PROMPTS):
        i = p * SAMPLES
        print(
            f"prompt {p}: mean score {scores[prompt == p].mean():.2f}",
            f"group {groups.group_ids[i]}, weight {groups.weights[i]:.2f}",
            f"KL coefficient {kl_coef[i]:.3f}",
            sep=", ",
        )
    print({k: round(v, 3) for k, v in groups.metrics.items() if "/0/" in k or "gap" in k})
    return groups.group_ids[::SAMPLES], weighted / advantages


if __name__ == "__main__":
    main()
