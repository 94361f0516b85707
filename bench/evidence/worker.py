"""One run in a process of its own, by the trainer's own command line, and what is kept of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

DRAWS = 4
"""Evaluations of the last policy: the run's own, and others with other random numbers."""
CURVES = (
    "objective/scores",
    "objective/kl",
    "objective/kl_coef",
    "objective/entropy",
    "group/gap",
    "group/worst",
    "group/0/mass",
    "group/0/weight",
    "group/weight_clamped",
    "value/explained_var",
    "rollout/length",
    "rollout/generated",
)
"""Of training, step by step."""
SAMPLE = ("gold", "score", "kl", "group")


@dataclass(frozen=True)
class Task:
    kind: str  # sft, rm: a stage whose models are kept. ppo; evaluate: the SFT model alone
    folder: Path
    seed: int
    disturb: tuple[tuple[str, float], ...] = ()

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def outcome(self) -> Path:
        return self.folder / "outcome.json"


def carry_out(task: Task) -> None:
    """In the child: train, evaluate, leave outcome.json in the folder."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler sees to it
    with task.log.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.flush()

    import json

    import torch

    from bench.evidence import disturb
    from trainer.__main__ import main

    torch.set_num_threads(1)
    began = time.time()
    disturb.apply(dict(task.disturb))

    def trainer(*arguments: str) -> None:
        code = main(list(arguments))
        if code:
            sys.exit(code)

    outcome: dict[str, Any] = {}
    if task.kind in ("sft", "rm", "ppo"):
        trainer(task.kind, str(task.config))
    if task.kind in ("ppo", "evaluate"):
        outcome = summary(task.folder)
        first = len(outcome["draws"])
        for draw in range(first, DRAWS):
            seed = task.seed + 1000 * draw
            trainer("eval", str(task.config), f"run.seed={seed}", "eval.final_samples=1000000")
            outcome["draws"].append(one_draw(task.folder, "eval_only"))
    if task.kind == "evaluate" and (guessing := _guessing(task.config)):
        outcome["guessing"] = guessing
    outcome["seconds"] = time.time() - began
    task.outcome.write_text(json.dumps(outcome))


def _guessing(config: Path) -> dict[str, float]:
    """By domain, where a world knows what guessing is worth."""
    from trainer.config import load
    from trainer.worlds import reasoning

    settings = load(str(config))
    if settings.data.prompts != "reasoning":
        return {}
    return reasoning.World(settings.reasoning).guessing()


def _end_with_parent() -> None:
    """A study that is killed outright takes its runs with it."""
    above = parent_process()
    assert above is not None
    above.join()
    os._exit(1)


# --- what is kept -------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    """Of a PPO run: its evaluations, its training curves, its last answers."""
    lines = _lines(folder / "metrics.jsonl")
    evaluations = [
        {k: _short(v) for k, v in line.items() if k != "stage"}
        for line in lines
        if line["stage"] == "eval"
    ]
    training = [line for line in lines if line["stage"] == "ppo"]
    curves = {
        name: [_short(line.get(name)) for line in training]
        for name in CURVES
        if any(line.get(name) is not None for line in training)
    }
    draws = [one_draw(folder, "eval")] if training else []
    return {"evaluations": evaluations, "curves": curves, "draws": draws}


def one_draw(folder: Path, stage: str) -> dict[str, Any]:
    """The last evaluation of `stage`: its metrics, and for each answer its figures, in order."""
    line = [each for each in _lines(folder / "metrics.jsonl") if each["stage"] == stage][-1]
    samples = [
        each
        for each in _lines(folder / "samples.jsonl")
        if each["stage"] == stage and each["step"] == line["step"]
    ]
    columns = {name: [_short(each[name], 4) for each in samples] for name in SAMPLE}
    return {
        "metrics": {k: _short(v) for k, v in line.items() if k not in ("stage", "step", "policy")},
        "prompts": _digest([each["prompt"] for each in samples]),
        "domain": [each["domain"] for each in samples],
        **{name: column for name, column in columns.items() if column and column[0] is not None},
    }


def _digest(texts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    from trainer.runs.log import read_lines

    return list(read_lines(path)) if path.is_file() else []


def _short(value: Any, digits: int = 6) -> Any:
    return round(value, digits) if isinstance(value, float) else value
