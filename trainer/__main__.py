"""The command line: `python -m trainer COMMAND CONFIG [section.key=value ...]`, or `gi`.

Everything is checked before anything is written: settings, models, data, reward functions, the
output folder. Whatever is wrong with them is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from trainer import config as settings
from trainer.config import Config, ConfigError

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
  doctor   what this machine has, what is missing and how to get it; with --kernels: whether each
           operation computes right here
  keys     every setting with its default and what it does; `gi keys groups`: of one section

CONFIG     a path to a .yaml file, or a packaged configuration: {packaged}

  --dry-run      check everything, print the plan with a memory estimate, write nothing
  --resume       go on where an interrupted run of this folder stopped
  --output DIR   the run folder (run.output)

gi train toy                                   everything, in minutes on a laptop
gi train toy groups.inference=none             plain PPO
gi train toy groups.beta=0 --output runs/b0    no variance term
gi report runs/toy runs/b0                     the two side by side
"""
STAGES = ("sft", "rm", "ppo", "metarm")
COMMANDS = ("train", *STAGES, "eval", "report", "doctor", "keys")


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
    try:
        return _run(_parse(arguments))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # ConfigError, DataError, RewardError and UsageError are one line for a person to read;
        # any other error is a bug and shows where it comes from.
        if getattr(error, "for_user", False):
            _tell(str(error))
            return getattr(error, "code", 2)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from trainer.runs import faults

            if lost := faults.lost_rank(error):
                print(f"gi: {lost}", file=sys.stderr)
                return 1
        raise


def _tell(error: str) -> None:
    """Once, for every rank has met it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"gi: {error}", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="gi", add_help=False, allow_abbrev=False)
    parser.add_argument("command")
    parser.add_argument("config", nargs="?", default="")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--output", default="")
    args = parser.parse_intermixed_args(arguments)
    if args.command not in COMMANDS:
        meant = settings.did_you_mean(args.command, COMMANDS)
        raise UsageError(f"{args.command}: no such command{meant}; want {', '.join(COMMANDS)}")
    if args.command not in ("doctor", "keys") and not args.config:
        what = "run folders" if args.command == "report" else "a configuration"
        raise UsageError(f"{args.command} wants {what}, for example: gi {args.command} toy")
    return args


def _run(args: argparse.Namespace) -> int:
    if args.command == "doctor":
        from trainer.cli import doctor

        return doctor.kernels() if args.kernels else doctor.show()
    if args.command == "keys":
        return _keys(args.config)
    if args.command == "report":
        return _report([args.config, *args.rest], args.output)

    overrides = list(args.rest)
    if args.output:
        overrides.append(f"run.output={args.output}")
    config = settings.load(args.config, overrides)
    stages = config.stages if args.command == "train" else (args.command,)
    # torchrun starts a fallen run again with the same words: it goes on, and not from the start.
    resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    _refuse_what_is_missing(config, stages, resume)

    from trainer import parallel
    from trainer.cli import hub, plan
    from trainer.cli.check import check

    fetch = None if args.dry_run else partial(hub.fetch, config, stages)
    parallel.start(config.trainer.timeout, first=fetch)
    checked = check(config, stages, dry_run=args.dry_run)
    _check_folder(config, args.command, resume)
    if args.dry_run:
        if parallel.is_main():
            print(plan.describe(config, stages, checked))
    else:
        _execute(config, args.command, stages, resume)
    parallel.stop()
    return 0


def _refuse_what_is_missing(config: Config, stages: Sequence[str], resume: bool) -> None:
    """Say plainly what this version cannot do, instead of doing something else."""
    if "metarm" in stages and config.metarm.rounds == 0:
        raise ConfigError("is 0; want 1 or more", "metarm.rounds")
    if resume and not set(stages) <= set(STAGES):
        raise UsageError(f"--resume is not there yet for {', '.join(stages)}")


def _check_folder(config: Config, command: str, resume: bool) -> None:
    """A run is not silently overwritten by one with other settings."""
    there = Path(config.run.output, "config.yaml")
    if Path(config.run.output).exists() and not Path(config.run.output).is_dir():
        raise ConfigError("is a file; want a folder", "run.output", config.run.output)
    if not there.is_file() or command == "eval" or resume:
        return
    changed = settings.differences(config, settings.load(str(there)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"holds a run with other settings ({', '.join(changed[:3])}{more}); choose another "
            "--output, or delete it",
            where=config.run.output,
        )


def _execute(config: Config, command: str, stages: Sequence[str], resume: bool) -> None:
    from trainer import parallel
    from trainer.models import loading
    from trainer.runs import checkpoint
    from trainer.runs.console import say
    from trainer.runs.folder import RunFolder
    from trainer.stages import metarm, registry

    if config.trainer.deterministic:
        parallel.deterministic()
    if config.run.threads:
        import torch

        torch.set_num_threads(config.run.threads)
    run = RunFolder(config.run.output)
    if resume and run.config.is_file():
        changed = settings.differences(config, settings.load(str(run.config)))
        if changed:
            say(f"goes on with other settings: {', '.join(changed)}")
    parallel.barrier()  # every rank has read what is there
    if command != "eval" and parallel.is_main():
        run.path.mkdir(parents=True, exist_ok=True)
        run.config.write_text(config.to_yaml(), encoding="utf-8")
    if not resume and command != "eval":
        metarm.undo(run)
        for stage in stages:  # else --resume would take an earlier run's stages for this one's
            checkpoint.forget(run, stage)
    say(f"on {parallel.describe()}, {loading.describe_attention(config)}")
    for stage in stages:
        registry.run(stage, config, run, resume)
    if command == "train" and parallel.is_main():
        from trainer import report

        say(f"report {report.write([run.path])}")


def _report(names: list[str], output: str) -> int:
    """Each name is a run folder, or a configuration whose folder it is."""
    folders = []
    for name in names:
        is_config = name in settings.packaged() or name.endswith((".yaml", ".yml"))
        folder = Path(name)
        if not folder.is_dir() and is_config:
            folder = Path(settings.load(name).run.output)
        if not (folder / "metrics.jsonl").is_file():
            raise UsageError(f"{name}: no run folder: {folder / 'metrics.jsonl'} is not there")
        folders.append(folder)
    from trainer import report

    print(report.write(folders, Path(output) if output else None))
    return 0


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
