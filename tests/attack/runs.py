"""Small whole runs, in processes that may be killed, and what they leave."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from tests.trainer import children, tiny
from trainer.runs.log import read_lines

PPO = ["toy", *tiny.SMALL, "toy.layers=1", "sft.steps=2", "sft.batch=16", "rm.steps=2",
       "rm.batch=16", "rm.pairs=32", "ppo.steps=2", "ppo.prompts_per_step=8",
       "rollout.max_new_tokens=6", "eval.samples_per_domain=2", "run.threads=1",
       "trainer.save_every=1", "run.stages=[sft, rm, ppo]"]  # fmt: skip
ROUND = ["metarm.rounds=1", "metarm.steps=2", "metarm.meta_prompts=8", "metarm.meta_batch=4",
         "metarm.samples=2", "metarm.test_prompts=8", "metarm.ppo_steps=2"]  # fmt: skip
BASELINE = ["baselines={plain: [groups.inference=none]}"]
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")


def kill_at_change(folder: Path, event: int, rank: int = 0, count_into: Path | None = None) -> None:
    """kill -9 of this process before the `event`-th change of a file below `folder`; 0: never."""
    seen, inside = 0, str(folder)

    def watch(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name == "open":
            if not isinstance(arguments[1], str) or not set(arguments[1]) & set("wa+x"):
                return
        elif name not in CHANGES:
            return
        if not str(arguments[0]).startswith(inside):
            return
        seen += 1
        if count_into is not None:
            os.write(counter, b".")
        if seen == event and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    if count_into is not None:
        counter = os.open(count_into, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(watch)


def command(arguments, said, folder, event, rank=0, count_into=None):
    without_report()
    kill_at_change(folder, event, rank, count_into)
    children.command(arguments, said if "RANK" not in os.environ else f"{said}{os.environ['RANK']}")


def without_report() -> None:
    """Its forty plots take longer than the run; tests/trainer/report attacks it. And no talk."""
    from trainer import report

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    report.write = lambda folders, output=None: Path(folders[0]) / "report.html"


def plain_command(arguments, said, kill=None):
    without_report()
    children.command(arguments, said, kill)


def gi(folder: Path, overrides, *flags, event=0, ranks=1, rank=0, count_into=None) -> list[int]:
    """Exit codes of `gi train` in `folder`; -9 where it was killed."""
    arguments = ["train", *overrides, *flags, "--output", str(folder)]
    said = folder.with_name(f"{folder.name}.said")
    more = (arguments, said, folder, event, rank, count_into)
    if ranks > 1:
        return children.run_ranks(ranks, command, *more)
    return [children.run(command, *more)]


def said(folder: Path) -> str:
    texts = sorted(folder.parent.glob(f"{folder.name}.said*"))
    return "".join(path.read_text(errors="replace") for path in texts)


def results(folder: Path) -> dict[str, object]:
    """All that a run says and makes, but for times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        found[str(path.relative_to(folder))] = tiny.without_times(read_lines(path))
    for path in sorted(folder.rglob("model.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    aside = (".new", ".old", ".tmp")
    found["left over"] = [path.name for path in folder.rglob(".*") if path.suffix in aside]
    return found


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
