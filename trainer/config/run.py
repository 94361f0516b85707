"""The run as a whole: what it does and where, when it is evaluated, what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.fields import Section, among, filled, key, such_that

STAGES = ("sft", "rm", "ppo", "metarm")


@dataclass(frozen=True, kw_only=True)
class Run(Section, at="run"):
    seed: int = key(
        0,
        "Seed of everything random in the run (the toy world has its own, toy.seed).",
        low=0,
        high=2**62,
        basic=True,
    )
    output: str = key(
        "", "Run folder; empty: runs/<name of the configuration>.", basic=True, result=False
    )
    stages: tuple[str, ...] = key(
        ("sft", "rm", "ppo"),
        "What `train` does, in this order; of sft, rm, ppo, metarm.",
        filled(f"some of {list(STAGES)}"),
        among(STAGES),
        such_that(lambda stages: len(set(stages)) == len(stages), "each stage once"),
        such_that(
            lambda stages: list(stages) == sorted(stages, key=STAGES.index),
            f"them in the order {', '.join(STAGES)}",
        ),
        basic=True,
    )
    threads: int = key(
        0,
        "CPU threads of torch; 0 leaves torch's own choice.",
        low=0,
        want="0 (torch's choice) or more",
        result=False,
    )
    memory: float = key(
        0.0,
        "GiB of each GPU that --dry-run plans for; 0: this machine's.",
        low=0,
        high=10_000,
        result=False,
    )
    ranks: int = key(
        0, "How many ranks --dry-run plans for; 0: as many as it runs on.", low=0, result=False
    )


@dataclass(frozen=True, kw_only=True)
class Eval(Section, at="eval"):
    every: int = key(
        20, "PPO steps between evaluations; 0: only before and after.", low=0, basic=True
    )
    samples_per_domain: int = key(256, "Built-in worlds: evaluation prompts a domain.", low=1)
    samples: int = key(
        1,
        "Answers to each evaluation prompt, and k of pass@k where answers are right or wrong.",
        low=1,
        basic=True,
    )
    final_samples: int = key(
        8, "Answers of each domain that the report shows, from the last evaluation.", low=0
    )


@dataclass(frozen=True, kw_only=True)
class Trainer(Section, at="trainer"):
    tokens_per_microbatch: int = key(
        8192,
        "Tokens in one forward and backward, in every stage: memory and speed, never the result.",
        low=1,
        basic=True,
    )
    optimizer: Literal["adamw", "adamw8bit", "offload"] = key(
        "adamw",
        "adamw8bit: its two moments take 8 bits a weight and not 32; offload: moments and masters "
        "are in the CPU's memory, and updated there.",
        basic=True,
    )
    masters: Literal["float32", "bfloat16"] = key(
        "float32",
        "Of the weights that are trained; bfloat16: half the memory, rounded by chance, and "
        "gradients are bfloat16, too.",
    )
    replicas: int = key(
        1,
        "Whole copies of each model, every one sharded over ranks / replicas (HSDP): one a node.",
        low=1,
    )
    timeout: float = key(
        1800.0,
        "Seconds for which ranks wait for each other: longer than the slowest judge or node takes.",
        above=0,
        result=False,
    )
    deterministic: bool = key(
        False,
        "The same bits from every run on the same GPUs and versions, at some speed; see "
        "docs/trainer.md.",
    )
    profile: bool = key(
        False,
        "Write a torch profiler trace and a memory timeline of a few steps, into profile/.",
        result=False,
    )
    profile_steps: tuple[int, ...] = key(
        (2, 3), "Which steps of each stage are profiled.", result=False
    )
    save_every: int = key(
        50,
        "Steps between checkpoints; 0: none but on SIGTERM. The final model is always saved.",
        low=0,
        basic=True,
        result=False,
    )
    keep_last: int = key(2, "Newest checkpoints that are kept.", low=1, result=False)
    best: tuple[str, ...] = key(
        ("eval/proxy", "rm/validation_accuracy"),
        "Metrics whose highest value marks the best checkpoint, kept as well; of those with one.",
        result=False,
    )
    async_save: bool = key(
        False,
        "Write checkpoints in the background: no waiting, for one more copy of the state in "
        "memory.",
        result=False,
    )
    max_skipped: int = key(
        5,
        "The run stops after this many steps in a row with a NaN or infinite loss or gradient.",
        low=1,
        result=False,
    )
    log: tuple[str, ...] = key(
        (),
        "Beside metrics.jsonl: tensorboard, wandb, trackio.",
        among(("tensorboard", "wandb", "trackio")),
        result=False,
        basic=True,
    )
    log_project: str = key(
        "gikernels", "What wandb and trackio file the run under.", filled("a name"), result=False
    )
    progress: bool = key(
        True, "Show progress: a bar on a terminal, elsewhere a line now and then.", result=False
    )
    progress_seconds: float = key(
        30.0, "Seconds between progress lines where there is no terminal.", low=0, result=False
    )
