"""The stages by the names that `run.stages` and the command line know them by."""

from __future__ import annotations

from collections.abc import Callable

import gikernels
from trainer.config import Config
from trainer.runs.folder import RunFolder
from trainer.stages import evaluate, metarm, policy, reward_model, sft

Run = Callable[[Config, RunFolder, bool], None]

STAGES: dict[str, Run] = {
    "sft": sft.run,
    "rm": reward_model.run,
    "ppo": policy.run,
    "metarm": metarm.run,
    "eval": evaluate.run,
}


def run(stage: str, config: Config, folder: RunFolder, resume: bool) -> None:
    """With the kernels that the configuration asks for."""
    with gikernels.backend(config.model.kernels):
        STAGES[stage](config, folder, resume)
