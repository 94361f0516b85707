"""What the head has said of prompts, for as long as it is worth knowing.

Drawing wants the head's opinion of many prompts for each one that is taken, and the head changes
slowly. So a step's pool is a window over the order of the data that moves on a little each step:
`groups.refresh` steps renew all of it, and only what has come in is asked about. Of a prompt that
is taken the critic says anew what it thinks, as it judges the answers, for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.order import order_of
from trainer.batch.sequences import on_device
from trainer.batch.types import Prompt
from trainer.config import Config


class Asked:
    """The head's logits of each prompt of the run, and the step that they are of."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], num_groups: int) -> None:
        groups, self.prompts = config.groups, prompts
        self.seed, self.refresh = config.run.seed, groups.refresh
        self.size = config.ppo.prompts_per_step * groups.pool
        self.coming = -(-self.size // groups.refresh)  # prompts that come into the pool a step
        rows = len(prompts) if groups.has_head and groups.choose else 0
        self.logits = torch.zeros(rows, num_groups, device=parallel.device())
        self.steps = torch.full((rows,), -1)  # on the CPU

    def pool(self, step: int) -> list[int]:
        """Places of the prompts that may be drawn at this step: a function of the step alone."""
        start = step * self.coming
        return order_of(self.prompts, range(start, start + self.size), self.seed, "ppo")

    def ask(self, pool: list[int], step: int, head: Callable[[list[int]], Tensor]) -> Tensor:
        """(pool, M) logits; `head` is asked for those of prompts that it has not judged of late."""
        places = torch.tensor(pool)
        last = self.steps[places]
        new = list(dict.fromkeys(places[(last < 0) | (last <= step - self.refresh)].tolist()))
        if new:
            self.tell(new, head(new), step)
        return self.logits[on_device(places)]

    def tell(self, prompts: list[int], logits: Tensor, step: int) -> None:
        """What the head says of these prompts now."""
        if len(self.steps):
            self.logits[torch.tensor(prompts, device=logits.device)] = logits.float()
            self.steps[prompts] = step

    def state_dict(self) -> dict:
        return {"logits": self.logits, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.logits, self.steps = state["logits"], state["steps"]
