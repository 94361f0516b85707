"""What the reference policy would have scored: performance that is comparable between prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.models.policy import Policy
from trainer.ppo.forward import check_engine
from trainer.rewards.scorer import Scorer
from trainer.rollout.engine import Engine


class ReferenceScores:
    """Raw scores of k answers of the reference policy to each prompt that the run will meet.

    Sampled when a prompt is first met, kept in the checkpoints. Empty where nothing asks for them.
    """

    def __init__(self, config: Config, prompts: int) -> None:
        self.config = config
        self.asked = config.groups.compared in ("over_reference", "quantile")
        shape = (prompts, config.groups.reference_answers) if self.asked else (0, 0)
        self.scores = torch.full(shape, torch.nan, device=parallel.device())  # (prompts, k)

    def of(self, chosen: list[int], samples: int) -> Tensor | None:  # (S, k)
        return self.scores[chosen].repeat_interleave(samples, 0) if self.asked else None

    def fill(
        self,
        engine: Engine,
        reference: Policy,
        scorer: Scorer,
        every: Sequence[Prompt],
        chosen: list[int],
        step: int,
    ) -> None:
        """Sample and score for those of the chosen prompts that have none yet."""
        if not self.asked:
            return
        missing = self.scores[:, 0].isnan().tolist()
        todo = [i for i in dict.fromkeys(chosen) if missing[i]]
        if not todo:
            return
        k, prompts = self.scores.shape[1], [every[i] for i in todo]
        engine.sync(reference)
        draws = parallel.generator(self.config.run.seed, "reference", step)
        rollout = engine.generate([p.ids for p in prompts], k, draws)
        check_engine(self.config, engine, rollout, reference, most=64)
        repeated = [p for p in prompts for _ in range(k)]
        scores = scorer(repeated, rollout.sequences, rollout.truncated)["total"]
        self.scores[torch.tensor(todo, device=scores.device)] = scores.view(-1, k)

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]
