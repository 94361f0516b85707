"""Where each model of a run starts."""

from __future__ import annotations

from trainer.config import Config, ConfigError
from trainer.runs import files
from trainer.runs.folder import RunFolder


def policy_source(config: Config, run: RunFolder) -> str:
    """Where the later stages' policy starts: what stage sft of this run made, if it has one."""
    if "sft" not in config.run.stages:
        return config.model.policy
    return made_by("sft", run)


def reference_source(config: Config, run: RunFolder) -> str:
    return config.model.reference or policy_source(config, run)


def start_name(config: Config) -> str:
    """What evaluations call a policy that PPO has not touched."""
    return "start" if config.model.reference else "sft"


def reward_source(config: Config, run: RunFolder) -> str:
    return config.model.reward or made_by("rm", run)


def made_by(stage: str, run: RunFolder) -> str:
    folder = run.model("policy" if stage == "ppo" else stage)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there: run stage {stage} first")
    files.refuse_damage(folder, f"put back a copy, or run stage {stage} again")
    return str(folder)
