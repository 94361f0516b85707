"""The command line: `python -m trainer COMMAND CONFIG [section.key=value ...]`, or `gi`.

Everything is checked before anything is written: settings, models, data, reward functions, the
output folder. Whatever is wrong with them is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer import config as settings
from trainer.config import Config, ConfigError

if TYPE_CHECKING:
    from trainer.runs.folder import RunFolder

HELP = """\
usage: gi COMMAND CONFIG [section.key=value ...] [--dry-run] [--resume] [--output DIR]

commands
  train    all stages that the configuration lists, in order, and the report
  sft      supervised fine-tuning
  rm       the reward model
  ppo      policy optimisation, group-invariant unless groups.inference=none
  metarm   rounds of a reward model that follows the policy, and of PPO with it
  eval     score a model on the evaluation prompts, by domain and group
  report   write report.html and plots of a run; `gi report A B` compares runs
  watch    the same page on 127.0.0.1 while the run goes on, updated with each step; --port N
  samples  answers of a run in the terminal: gi samples RUN [RUN] domain=sort group=0 score=..0.5
           sort=lowest|highest|apart by=gold step=40 words=... count=10
  init     a commented config.yaml that fits: gi init --model M --data D [--gpus N] [--memory GIB]
           [--output FILE] [section.key=value ...]; asks nothing that it can find out
  export   a model that a run has made, as a folder for others: an adapter as PEFT reads it, or with
           --merge in its base; `gi export RUN [policy|rm|sft] [--merge] [--dtype bf16]`
  doctor   what this machine has, what is missing and how to get it; with --kernels: whether each
           operation computes right here; `gi doctor RUN`: whether all files of a run folder are
           what was written
  keys     every setting with its default and what it does; `gi keys groups`: of one section

CONFIG     a path to a .yaml file, or a packaged configuration: {packaged}

  --dry-run      check everything, print the plan with a memory estimate, write nothing
  --resume       go on where an interrupted run of this folder stopped
  --output DIR   the run folder (run.output)
  --debug        the whole traceback of whatever goes wrong (or GI_TRACEBACK=1)

gi train toy                                   everything, in minutes on a laptop
gi train toy groups.inference=none             plain PPO
gi train toy groups.beta=0 --output runs/b0    no variance term
gi report runs/toy runs/b0                     the two side by side
"""
STAGES = ("sft", "rm", "ppo", "metarm")
COMMANDS = (
    "train",
    *STAGES,
    "eval",
    "report",
    "watch",
    "samples",
    "export",
    "init",
    "doctor",
    "keys",
)


OF_RUNS = ("report", "watch", "samples", "export")


class UsageError(ValueError):
    """One line: what is wrong with the command itself."""

    for_user = True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(HELP.format(packaged=", ".join(settings.packaged())), end="")
        return 0 if arguments else 2
    from trainer.runs import children

    children.die_with_parent()
    debug = "--debug" in arguments or os.environ.get("GI_TRACEBACK", "0") not in ("", "0")
    try:
        return _run(_parse([each for each in arguments if each != "--debug"]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from trainer.cli import failure

        return failure.end(error, debug)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="gi", add_help=False, allow_abbrev=False)
    parser.add_argument("command")
    parser.add_argument("config", nargs="?", default="")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--output", default="")
    parser.add_argument("--port", type=int, default=0)
    for name, kind in (("model", str), ("data", str), ("gpus", int), ("memory", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--dtype", default="")
    args = parser.parse_intermixed_args(arguments)
    if args.command not in COMMANDS:
        meant = settings.did_you_mean(args.command, COMMANDS)
        raise UsageError(f"{args.command}: no such command{meant}; want {', '.join(COMMANDS)}")
    if args.command not in ("doctor", "keys", "init") and not args.config:
        what = "run folders" if args.command in OF_RUNS else "a configuration"
        raise UsageError(f"{args.command} wants {what}, for example: gi {args.command} toy")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from trainer.cli import doctor, integrity

        if args.config:
            return integrity.show([args.config, *args.rest])
        return doctor.kernels() if args.kernels else doctor.show()
    if args.command == "keys":
        return _keys(args.config)
    if args.command == "export":
        from trainer.cli import export

        return export.run(args.config, args.rest, args.merge, args.dtype, args.output)
    if args.command == "report":
        return _report([args.config, *args.rest], args.output)
    if args.command == "init":
        return _init(args)
    if args.command == "samples":
        from trainer.cli import samples

        given = [args.config, *args.rest]
        filters = [each for each in given if "=" in each and not Path(each).is_dir()]
        return samples.show(_folders([each for each in given if each not in filters]), filters)
    if args.command == "watch":
        from trainer.cli import watch

        return watch.serve(_folders([args.config, *args.rest], "config.yaml"), args.port)

    overrides = list(args.rest)
    if args.output:
        overrides.append(f"run.output={json.dumps(args.output)}")
    config = settings.load(args.config, overrides)
    stages = config.stages if args.command == "train" else (args.command,)
    _refuse_what_is_missing(config, stages, args.resume)

    from trainer import parallel
    from trainer.cli import failure, hub, plan
    from trainer.cli.check import check

    fetch = None if args.dry_run else partial(hub.fetch, config, stages)
    parallel.start(config.trainer.timeout, first=fetch)
    checked = check(config, stages, dry_run=args.dry_run)
    from trainer.cli import begin  # not before: it brings transformers, which then looks for a hub

    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not restarted or args.dry_run:
        begin.check(config, args.command, args.resume)
    if args.dry_run:
        if parallel.is_main():
            print(plan.describe(config, stages, checked))
    else:
        with begin.folder(config, args.command, stages, args.resume) as (run, resume):
            failure.belongs_to(run.path)
            _execute(config, args.command, stages, run, resume)
    parallel.stop()
    return 0


def _refuse_what_is_missing(config: Config, stages: Sequence[str], resume: bool) -> None:
    """Say plainly what this version cannot do, instead of doing something else."""
    if "metarm" in stages and config.metarm.rounds == 0:
        raise ConfigError("is 0; want 1 or more", "metarm.rounds")
    if resume and not set(stages) <= set(STAGES):
        raise UsageError(f"--resume is not there yet for {', '.join(stages)}")


def _execute(
    config: Config, command: str, stages: Sequence[str], run: RunFolder, resume: bool
) -> None:
    from trainer import parallel
    from trainer.models import loading
    from trainer.runs.console import say
    from trainer.runs.faults import ends_at_sigterm
    from trainer.stages import registry

    if config.trainer.deterministic:
        parallel.deterministic()
    if config.run.threads:
        import torch

        torch.set_num_threads(config.run.threads)
    say(f"on {parallel.describe()}, {loading.describe_attention(config)}")
    if config.model.compile:
        say("model.compile: the first steps of a stage compile, minutes on a CPU")
    with ends_at_sigterm():
        for stage in stages:
            registry.run(stage, config, run, resume)
    if command == "train" and parallel.is_main():
        from trainer import report

        say(f"report {report.write([run.path])}")


def _init(args: argparse.Namespace) -> int:
    for name, example in (("model", "Qwen/Qwen2.5-0.5B"), ("data", "pairs.jsonl")):
        if not getattr(args, name):
            raise UsageError(f"init wants --{name}, for example --{name} {example}")
    from trainer.cli import init

    overrides = [each for each in (args.config, *args.rest) if each]
    return init.write(args.model, args.data, args.gpus, args.memory, args.output, overrides)


def _report(names: list[str], output: str) -> int:
    folders = _folders(names)
    from trainer import report

    print(report.write(folders, Path(output) if output else None))
    return 0


def _folders(names: list[str], begun: str = "metrics.jsonl") -> list[Path]:
    """Each name is a run folder, or a configuration whose folder it is. `begun`: the file that says
    so."""
    folders = []
    for name in names:
        is_config = name in settings.packaged() or name.endswith((".yaml", ".yml"))
        folder = Path(name)
        if not folder.is_dir() and is_config:
            folder = Path(settings.load(name).run.output)
        if not any((folder / each).is_file() for each in (begun, "metrics.jsonl")):
            raise UsageError(f"{name}: no run folder: {folder / begun} is not there")
        folders.append(folder)
    return folders


def _keys(section: str) -> int:
    sections = settings.fields_of(Config)
    names = [each.name for each in sections]
    if section == "reward.functions":
        return _named_rewards()
    if section and section not in names:
        meant = settings.did_you_mean(section, names)
        raise UsageError(f"{section}: no such section{meant}; there are {', '.join(names)}")
    print("+ marks what few runs change")
    for each in sections:
        if section in ("", each.name):
            print(f"\n{each.name}")
            for key in settings.fields_of(each.section) if each.section else ():
                mark = " " if key.basic else "+"
                said = f"{key.name}: {settings.as_yaml(key.default)}"
                print(f"{mark} {said:<34}  {key.doc}")
    return 0


def _named_rewards() -> int:
    print("function, weight, name, and of each by name:")
    common = {each.name for each in settings.fields_of(settings.RewardFunction)}
    for name, kind in settings.NAMED.items():
        print(f"\n{name}: {' '.join((kind.__doc__ or '').split())}")
        for key in settings.fields_of(kind):
            if key.name not in common:
                print(f"  {f'{key.name}: {settings.as_yaml(key.default)}':<34}  {key.doc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
