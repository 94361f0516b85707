"""Prompts drawn by group in a plain PyTorch loop: rewards in, next prompts out.

A toy policy answers each of three skills with a chance that grows with practice. Prompts of the
rare skill, "hard", are learnt as often as the others only where they are drawn as often.
"""

import torch
from torch.utils.data import DataLoader

from gikernels.integrations import GroupSampler

PROMPTS = ["easy"] * 160 + ["medium"] * 64 + ["hard"] * 32  # nobody tells the sampler
START, GAIN = {"easy": 0.6, "medium": 0.4, "hard": 0.1}, 0.0008
BATCH, ANSWERS = 16, 4


def main(steps: int = 120, rule: str = "even") -> dict[str, float]:
    torch.manual_seed(0)
    chance = dict(START)
    dataset = list(enumerate(PROMPTS))  # a row's number comes along with it

    sampler = GroupSampler(len(dataset), BATCH, rule=rule, num_groups=3)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)

    seen = dict.fromkeys(START, 0)
    stream = iter(loader)
    for _ in range(steps):
        batch = next(stream, None)
        if batch is None:  # an epoch has as many draws as there are prompts
            stream = iter(loader)
            batch = next(stream)
        rows, skills = batch
        p = torch.tensor([chance[skill] for skill in skills])
        rewards = (torch.rand(ANSWERS, BATCH) < p).float().T  # of all ranks: gather them first

        sampler.observe(rows.repeat_interleave(ANSWERS), rewards.flatten())

        for skill in skills:
            seen[skill] += 1
            chance[skill] = min(0.95, chance[skill] + GAIN)
    for skill in START:
        share, drawn = PROMPTS.count(skill) / len(PROMPTS), seen[skill] / (steps * BATCH)
        print(f"{skill}: {share:.0%} of the prompts, {drawn:.0%} of the draws; {chance[skill]:.2f}")
    return chance  # save sampler.state_dict() beside your checkpoints


if __name__ == "__main__":
    main()
