"""The stages by the names that `run.stages` and the command line know them by."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import Config
from trainer.runs.folder import RunFolder
from trainer.stages import evaluate, metarm, policy, reward_model, sft

RUN: dict[str, Callable[[Config, RunFolder, bool], None]] = {
    "sft": sft.run,
    "rm": reward_model.run,
    "ppo": policy.run,
    "metarm": metarm.run,
    "eval": evaluate.run,
}
