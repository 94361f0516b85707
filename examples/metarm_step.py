"""A MetaRM step: train on preference pairs at the point that tells fresh samples apart best."""

import torch
from torch import nn

from gikernels import difference_objective, meta_ascent, preference_loss

PAIRS, PROMPTS, SAMPLES, D = 64, 16, 5, 8


def main(steps: int = 150) -> tuple[float, float]:
    torch.manual_seed(0)
    taste = torch.randn(D)
    reward = nn.Sequential(nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(reward.parameters(), lr=3e-3)

    def accuracy(shift: float) -> float:
        a, b = torch.randn(2, 2000, D) + shift
        with torch.no_grad():
            agrees = (reward(a) > reward(b)).squeeze(-1) == (a @ taste > b @ taste)
        return agrees.float().mean().item()

    for step in range(steps):
        a, b = torch.randn(2, PAIRS, D)  # the original preference pairs
        better = (a @ taste > b @ taste).unsqueeze(-1)
        chosen, rejected = torch.where(better, a, b), torch.where(better, b, a)
        fresh = torch.randn(PROMPTS, SAMPLES, D) + 1.0  # the policy has drifted since

        optimizer.zero_grad()
        spread = difference_objective(reward(fresh).squeeze(-1))  # J
        spread.backward()
        # theta' = theta + lr * grad J / ||grad J|| inside; theta, with the gradient of the loss
        # taken at theta', outside.
        with meta_ascent(reward.parameters(), lr=0.01, normalise=True):
            loss = preference_loss(reward(chosen).squeeze(-1), reward(rejected).squeeze(-1))
            loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}  spread {spread.item():.3f}")
    print(f"accuracy on the pairs' distribution {accuracy(0.0):.2f}, drifted {accuracy(1.0):.2f}")
    return accuracy(0.0), accuracy(1.0)


if __name__ == "__main__":
    main()
