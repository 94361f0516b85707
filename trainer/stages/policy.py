"""Stage 3, the policy: the run's own PPO, the runs beside it, and the table that compares them."""

from __future__ import annotations

from trainer.config import Config
from trainer.ppo import loop
from trainer.report.table import final_table
from trainer.runs.console import say
from trainer.runs.folder import RunFolder
from trainer.stages import baselines


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    with baselines.running(config, run, resume):
        loop.run(config, run, resume)
    title = "group-invariant" if config.groups.active else "PPO"
    compared = {title: run, **{name: run.baseline(name) for name in config.baselines}}
    if table := final_table(compared):
        say(table)
