"""Every setting of a run: frozen dataclasses whose fields say it all, and a strict loader.

    config = load("toy", ["groups.beta=0", "kl.adaptive=false"])     # a packaged name, or a path

A configuration file is YAML whose top-level keys are the sections below; what it leaves out keeps
its default. Overrides are `section.key=value`, with the value read as YAML. Unknown keys, wrong
types and values that make no sense raise a ConfigError of one line, which names the file and line
(or the override) and the key. Nothing here imports torch, so `gi --help` stays quick.
"""

from __future__ import annotations

from trainer.config.convert import Setting, fields_of, flat
from trainer.config.data import Columns, Data, Source, Sources
from trainer.config.document import as_yaml, read
from trainer.config.fields import ConfigError, Section, did_you_mean, key, require
from trainer.config.inputs import OPERATIONS, Model, Toy
from trainer.config.lora import Lora
from trainer.config.policy import Groups, Kl, Ppo, Rollout
from trainer.config.reader import find, load, packaged
from trainer.config.reasoning import Reasoning
from trainer.config.rewards import NAMED, Reward, RewardFunction
from trainer.config.run import STAGES, Eval, Run, Trainer
from trainer.config.schema import BASELINE_SECTIONS, Config, differences, resolve
from trainer.config.stages import MetaRm, Rm, Sft

__all__ = [
    "BASELINE_SECTIONS",
    "NAMED",
    "OPERATIONS",
    "STAGES",
    "Columns",
    "Config",
    "ConfigError",
    "Data",
    "Eval",
    "Groups",
    "Kl",
    "Lora",
    "MetaRm",
    "Model",
    "Ppo",
    "Reasoning",
    "Reward",
    "RewardFunction",
    "Rm",
    "Rollout",
    "Run",
    "Section",
    "Setting",
    "Sft",
    "Source",
    "Sources",
    "Toy",
    "Trainer",
    "as_yaml",
    "did_you_mean",
    "differences",
    "fields_of",
    "find",
    "flat",
    "key",
    "load",
    "packaged",
    "read",
    "require",
    "resolve",
]
