"""Config: all sections, what relates them, and how one is made from plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.convert import build, fields_of, flat, plain
from trainer.config.data import Data
from trainer.config.document import apply, dump, where_said
from trainer.config.fields import ConfigError, Section, key, spelled
from trainer.config.inputs import Model, Toy
from trainer.config.lora import Lora
from trainer.config.policy import Groups, Kl, Ppo, Rollout
from trainer.config.reasoning import Reasoning
from trainer.config.rewards import Reward
from trainer.config.run import Eval, Run, Trainer
from trainer.config.stages import MetaRm, Rm, Sft

# What the runs under `baselines` may change: they share the SFT and the reward model.
BASELINE_SECTIONS = ("reward", "rollout", "ppo", "groups", "kl")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    run: Run = key(Run(), "The run as a whole.")
    model: Model = key(Model(), "Policy, reward model, critic.")
    lora: Lora = key(Lora(), "Adapters on one frozen base, in place of all weights.")
    data: Data = key(Data(), "Where prompts, demonstrations and pairs come from.")
    toy: Toy = key(Toy(), "The built-in world of letters.")
    reasoning: Reasoning = key(Reasoning(), "The built-in world of problems with exact answers.")
    sft: Sft = key(Sft(), "Stage 1: supervised fine-tuning.")
    rm: Rm = key(Rm(), "Stage 2: the reward model.")
    reward: Reward = key(Reward(), "What an answer scores.")
    rollout: Rollout = key(Rollout(), "How answers are sampled.")
    ppo: Ppo = key(Ppo(), "Stage 3: policy optimisation.")
    groups: Groups = key(Groups(), "Group-invariant learning.")
    kl: Kl = key(Kl(), "The KL penalty.")
    metarm: MetaRm = key(MetaRm(), "Rounds of a reward model that follows the policy.")
    eval: Eval = key(Eval(), "When and on how much the policy is evaluated.")
    trainer: Trainer = key(Trainer(), "Memory, checkpoints, logging.")
    baselines: Mapping[str, tuple[str, ...]] = key(
        {},
        "Further PPO runs beside this one, which share its SFT and reward model: name -> "
        "overrides.",
        spelled(r"\w[\w.+-]{0,99}", "a name of letters, digits, . + - _, at most 100 of them"),
        basic=True,
    )

    def relations(self) -> None:
        if self.groups.active:
            many, batch = self.groups.num_groups, self.ppo.sequences_per_step
            self.require(
                self.groups.inference != "exact" or many * self.groups.min_size <= batch,
                "groups.min_size",
                f"at most {batch // many}: {many} groups of a batch of {batch}",
            )
            trains_the_rm = "rm" in self.run.stages and self.model.reward == ""
            self.require(
                not (self.groups.performance == "rating" and trains_the_rm and self.rm.rating == 0),
                "groups.performance",
                "rm.rating > 0 with it: only then are scores of different prompts comparable",
            )
        self.require(
            self.groups.draw != "dynamic" or self.ppo.samples_per_prompt > 1,
            "ppo.samples_per_prompt",
            "2 or more with groups.draw=dynamic, which drops prompts whose answers score the same",
        )
        self.require(
            not self.kl.controller or len(self.kl.target) in (1, self.groups.num_groups),
            "kl.target",
            f"one number, or one for each of {self.groups.num_groups} groups",
        )
        self.require(
            not (self.model.critic == "reward" and self.reward.model_weight == 0)
            or not self.ppo.has_critic,
            "model.critic",
            "policy or a path: with reward.model_weight=0 there is no reward model to start from",
        )
        self.require(
            self.metarm.rounds == 0 or self.model.reward == "",
            "metarm.rounds",
            "0 with model.reward: rounds go on with the reward model that stage rm made",
        )
        self.require(
            self.metarm.rounds == 0 or self.reward.model_weight != 0,
            "metarm.rounds",
            "0 with reward.model_weight=0: there is no reward model",
        )
        self.require(
            self.metarm.prompts == "train" or self.data.ood_prompts != "",
            "metarm.prompts",
            "train, or a source in data.ood_prompts",
        )
        self.require(
            not (self.trainer.deterministic and self.rollout.engine == "vllm"),
            "rollout.engine",
            "hf with trainer.deterministic=true: vLLM promises no bits",
        )
        self.require(
            self.trainer.masters == "float32" or self.model.dtype == "bfloat16",
            "trainer.masters",
            "float32 with model.dtype=float32",
        )
        self.require(
            self.trainer.optimizer != "offload" or self.trainer.masters == "float32",
            "trainer.masters",
            "float32 with trainer.optimizer=offload: the CPU's memory has room for them",
        )
        lean = self.trainer.optimizer != "adamw" or self.trainer.masters != "float32"
        self.require(
            not (lean and self.lora.active),
            "trainer.optimizer",
            "adamw, and trainer.masters=float32, with lora.rank > 0: of adapters there is nothing "
            "to save",
        )
        self.require(
            self.lora.quantize == "none" or self.rollout.engine == "hf",
            "rollout.engine",
            "hf with lora.quantize=nf4: vLLM would sample from weights that are not quantised",
        )
        self.require(
            "metarm" not in self.run.stages or self.metarm.rounds > 0,
            "metarm.rounds",
            "1 or more with stage metarm",
        )

    @property
    def stages(self) -> tuple[str, ...]:
        """What `train` does: the stages of the run, and MetaRM's rounds behind PPO if asked for."""
        rounds = self.metarm.rounds > 0 and "ppo" in self.run.stages
        asked = self.run.stages
        return (*asked, "metarm") if rounds and "metarm" not in asked else asked

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def to_yaml(self) -> str:
        return dump(self.to_dict())

    def override(self, overrides: Sequence[str]) -> Config:
        """This configuration with some `section.key=value` applied, checked as when loaded."""
        return resolve(self.to_dict(), {}, overrides, "")

    def baseline(self, name: str) -> Config:
        """The run `name` under `baselines`, in its own folder, with no baselines and no rounds."""
        inner = self.override(self.baselines[name])
        run = dataclasses.replace(self.run, output=str(Path(self.run.output, "baselines", name)))
        no_rounds = dataclasses.replace(inner.metarm, rounds=0)
        return dataclasses.replace(inner, run=run, metarm=no_rounds, baselines={})


def resolve(
    data: dict[str, Any], lines: dict[str, str], overrides: Sequence[str], output: str
) -> Config:
    lines = dict(lines)
    try:
        for override in overrides:
            apply(data, override, lines)
        config = build(Config, data, "", Config)
        for name, items in config.baselines.items():
            _check_baseline(config, name, items)
    except ConfigError as error:
        raise ConfigError(
            error.problem, error.key, error.where or where_said(error.key, lines)
        ) from None
    if output and config.run.output == "":
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output=output))
    return config


def _check_baseline(config: Config, name: str, items: Sequence[str]) -> None:
    alone = dataclasses.replace(config, baselines={})
    for item in items:
        section = item.partition(".")[0]
        if section not in BASELINE_SECTIONS and section in {
            f.name for f in dataclasses.fields(Config)
        }:
            raise ConfigError(
                f"{item!r} changes what baselines share; they may change "
                f"{', '.join(BASELINE_SECTIONS)}",
                f"baselines.{name}",
            )
    try:
        alone.override(items)
    except ConfigError as error:
        raise ConfigError(str(error), f"baselines.{name}") from None


def differences(ours: Config, theirs: Config) -> list[str]:
    """`key: theirs -> ours` for every setting that changes a run's result, for messages."""
    cosmetic = {
        f"{section.name}.{setting.name}"
        for section in fields_of(Config)
        if section.section
        for setting in fields_of(section.section)
        if not setting.result
    }
    a, b = flat(ours.to_dict()), flat(theirs.to_dict())
    return [
        f"{key}: {b.get(key)!r} -> {a.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in cosmetic
    ]
