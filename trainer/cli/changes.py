"""Going on with other settings: what that may change, and what it may not any more."""

from __future__ import annotations

from pathlib import Path

from trainer import config as settings
from trainer.config import Config, ConfigError
from trainer.runs import files
from trainer.runs.checkpoint import steps_done
from trainer.runs.folder import RunFolder
from trainer.runs.names import one_line
from trainer.worlds import registry

ORDER = ("sft", "rm", "ppo", "metarm")
FIRST = {
    **dict.fromkeys(("run", "model", "lora", "data", "toy", "sft"), "sft"),
    "rm": "rm",
    **dict.fromkeys(("rollout", "reward", "ppo", "groups", "kl", "eval"), "ppo"),
    **dict.fromkeys(("model.reward", "model.reference", "model.critic"), "ppo"),
    **dict.fromkeys(("data.prompts", "data.eval_prompts", "data.ood_prompts"), "ppo"),
    **dict.fromkeys(("data.pairs", "data.columns.margin", "data.columns.rating"), "rm"),
    "metarm": "metarm",
}
"""Section, or key -> the first stage that it matters to."""
HOW = (
    "run.stages",
    "baselines",  # each is a run with settings of its own, which are checked in its own folder
    "trainer",
    "model.attention",
    "model.packing",
    "model.kernels",
    "model.compile",
    "model.gradient_checkpointing",
    *(f"model.offload_{name}" for name in ("reference", "reward", "critic", "activations")),
    "metarm.rounds",
    "lora.sync",
    *(f"rollout.{name}" for name in ("batch", "logprob_bound", "gpu_memory", "sleep", "timeout")),
    *(f"rollout.{name}" for name in ("cuda_graphs", "sync_bucket_mb", "tensor_parallel")),
)
"""Sections and keys that change how a stage is computed, or which ones there are."""


def refuse_changes(run: RunFolder, config: Config) -> list[str]:
    """`key: theirs -> ours` where the folder's settings are others; raises where a stage that is
    done was trained with the old ones, for its model would not be what config.yaml says."""
    if not run.config.is_file():
        return []
    changed = [
        each
        for each in settings.differences(config, settings.load(str(run.config)))
        if not _same_model(each)
    ]
    done = [stage for stage in ORDER if _is_done(run, stage)]
    for each in changed:
        first = _first(each.partition(":")[0], config)
        late = [stage for stage in done if first and ORDER.index(first) <= ORDER.index(stage)]
        if late and not _only_longer(each, late[0], done):
            raise ConfigError(
                f"stage {late[0]} is done with other settings ({one_line(each, 120)}): go on with "
                "those, or choose another --output",
                where=str(run.path),
            )
    return changed


def _first(key: str, config: Config) -> str | None:
    """The first stage that a setting matters to; None where it matters to no result."""
    parts = key.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    if any(name in HOW for name in names):
        return None
    if parts[0] == "rollout" and registry.is_world(config.data.pairs):
        return "rm"  # for which a world's pairs are sampled
    return next((FIRST[name] for name in names if name in FIRST), "sft")


def _only_longer(change: str, stage: str, done: list[str]) -> bool:
    """More steps of the policy, and nothing after it: it goes on where it stopped."""
    key, _, values = change.partition(": ")
    old, _, new = values.partition(" -> ")
    return (key, stage, done[-1]) == ("ppo.steps", "ppo", "ppo") and int(new) > int(old)


def _is_done(run: RunFolder, stage: str) -> bool:
    if stage == "metarm":
        return steps_done(run.round(1).checkpoints("round")) is not None
    return steps_done(run.checkpoints(stage)) is not None


def _same_model(change: str) -> bool:
    """A run folder that was moved has its own models elsewhere."""
    key, _, values = change.partition(": ")
    ends = [Path(each.strip("'")).parts[-2:] for each in values.split(" -> ")]
    return key.startswith("model.") and len({*ends}) == 1 and ends[0][:1] == ("models",)


def write_settings(run: RunFolder, config: Config, changed: list[str]) -> None:
    """config.yaml; with what was changed on the way in lines at its top."""
    notes = []
    if changed and run.config.is_file():
        lines = run.config.read_text(encoding="utf-8").splitlines()
        notes = [line for line in lines if line.startswith("# ")]
        notes += [f"# went on with {one_line(each, 200)}" for each in changed]
    files.write(run.config, "".join(f"{note}\n" for note in notes) + config.to_yaml())
