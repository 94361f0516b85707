"""The run as a whole: what it does and where, when it is evaluated, what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.fields import choices, want

STAGES = ("sft", "rm", "ppo", "metarm")


@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0
    """Seed of everything random in the run (the toy world has its own, toy.seed)."""
    output: str = ""
    """Run folder; empty: runs/<name of the configuration>."""
    stages: tuple[str, ...] = ("sft", "rm", "ppo")
    """What `train` does, in this order; of sft, rm, ppo, metarm."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    ranks: int = 0
    """How many ranks --dry-run plans for; 0: as many as it runs on."""

    def __post_init__(self) -> None:
        want(self.seed >= 0, "run.seed", self.seed, "0 or more")
        want(self.threads >= 0, "run.threads", self.threads, "0 (torch's choice) or more")
        want(self.ranks >= 0, "run.ranks", self.ranks, "0 or more")
        want(len(self.stages) > 0, "run.stages", list(self.stages), f"some of {list(STAGES)}")
        for stage in self.stages:
            want(stage in STAGES, "run.stages", stage, choices(stage, STAGES))
        want(
            len(set(self.stages)) == len(self.stages),
            "run.stages",
            list(self.stages),
            "each stage once",
        )


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: int = 20
    """PPO steps between evaluations; 0: only before and after."""
    samples_per_domain: int = 256
    """Toy world: evaluation prompts a domain."""
    batch: int = 256
    """Sequences that are evaluated together."""
    final_samples: int = 8
    """Answers of each domain that the report shows, from the last evaluation."""

    def __post_init__(self) -> None:
        want(self.every >= 0, "eval.every", self.every, "0 or more")
        want(self.final_samples >= 0, "eval.final_samples", self.final_samples, "0 or more")
        for key in ("samples_per_domain", "batch"):
            want(getattr(self, key) > 0, f"eval.{key}", getattr(self, key), "1 or more")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    tokens_per_microbatch: int = 8192
    """Tokens in one forward and backward, in every stage: memory and speed, never the result."""
    replicas: int = 1
    """Whole copies of each model, every one sharded over ranks / replicas (HSDP): one a node."""
    profile: bool = False
    """Write a torch profiler trace and a memory timeline of a few steps, into profile/."""
    profile_steps: tuple[int, ...] = (2, 3)
    """Which steps of each stage are profiled."""
    save_every: int = 50
    """Steps between checkpoints; 0: none but on SIGTERM. The final model is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    best: tuple[str, ...] = ("eval/proxy", "rm/validation_accuracy")
    """Metrics whose highest value marks the best checkpoint, kept as well; of those with one."""
    async_save: bool = False
    """Write checkpoints in the background: no waiting, for one more copy of the state in memory."""
    max_skipped: int = 5
    """The run stops after this many steps in a row with a NaN or infinite loss or gradient."""
    log: tuple[str, ...] = ()
    """Beside metrics.jsonl: tensorboard, wandb."""
    progress: bool = True
    """Show progress bars (only ever on a terminal)."""

    def __post_init__(self) -> None:
        want(
            self.tokens_per_microbatch > 0,
            "trainer.tokens_per_microbatch",
            self.tokens_per_microbatch,
            "1 or more",
        )
        want(self.save_every >= 0, "trainer.save_every", self.save_every, "0 or more")
        want(self.keep_last > 0, "trainer.keep_last", self.keep_last, "1 or more")
        want(self.replicas > 0, "trainer.replicas", self.replicas, "1 or more")
        want(self.max_skipped > 0, "trainer.max_skipped", self.max_skipped, "1 or more")
        for sink in self.log:
            known = ("tensorboard", "wandb")
            want(sink in known, "trainer.log", sink, choices(sink, known))
