"""A toy world small enough that a whole run takes seconds."""

import dataclasses

from trainer.config import load

SMALL = [
    "run.seed=100",
    "toy.hidden=32",
    "toy.layers=2",
    "toy.heads=2",
    "toy.intermediate=64",
    "toy.demonstrations=512",
    "toy.prompts=64",
    "sft.steps=12",
    "sft.batch=64",
    "rm.steps=6",
    "rm.batch=32",
    "rm.pairs=128",
    "ppo.steps=3",
    "ppo.prompts_per_step=32",
    "ppo.critic_warmup_steps=0",
    "groups.min_size=2",
    "kl.coef=0.3",
    "eval.every=2",
    "eval.samples_per_domain=8",
    "trainer.progress=false",
    "trainer.tokens_per_microbatch=100000",
    "baselines={}",
]


def config(output, *overrides):
    made = load("toy", [*SMALL, *overrides])
    return dataclasses.replace(made, run=dataclasses.replace(made.run, output=str(output)))


def without_times(lines):
    times = ("perf/", "timing/")
    return [{k: v for k, v in line.items() if not k.startswith(times)} for line in lines]
