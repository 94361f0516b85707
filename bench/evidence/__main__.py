"""The study in one command; what is there already is not run again.

    python -m bench.evidence                      everything, in order: the main comparison first
    python -m bench.evidence --section main       one section, or several with commas
    python -m bench.evidence --arms default,m4    some of their arms; --list names them
    python -m bench.evidence --seeds 1-5          other seeds than each section's own number
    python -m bench.evidence --quick              a smoke run of a few minutes: no evidence
    python -m bench.evidence --analyse-only       the page, from what is there
    python -m bench.evidence --seeds 100-102      tuning seeds: a page of their own, no evidence
    python -m bench.evidence --world reasoning    the study of another world, with its own page

Killed, it goes on where it was. Results lie in --folder, one small file a run; a run whose settings
have changed runs again (--again ARM runs it again anyway, after a change of the code).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.evidence import matrix, quick
from bench.evidence.matrix import ARMS, SECTIONS, TUNING_SEEDS
from bench.evidence.scheduler import Scheduler, Study, StudyError, cores
from bench.evidence.store import Store
from bench.host.machine import ROOT, commit
from trainer.config import ConfigError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    try:
        return study(args)
    except (StudyError, ConfigError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evidence: stopped; the same command goes on", file=sys.stderr)
        return 130


def study(args: argparse.Namespace) -> int:
    sections = _sections(args)
    small = quick.TOY if args.world == "toy" else quick.REASONING
    seeds = {name: _seeds(args, name) for name in sections}
    tuning = any(seed in TUNING_SEEDS for each in seeds.values() for seed in each)
    folder = Path(args.folder) / ("quick" if args.quick else "tuning" if tuning else "")
    store = Store(folder)
    extra = (*(small if args.quick else ()), *args.set)
    runs = Study(store, extra)
    wanted = order(sections, seeds, _arms(args))
    if args.list:
        for name in sections:
            arms = ", ".join(SECTIONS[name].arms)
            print(f"{name:<12} seeds {seeds[name][0]}-{seeds[name][-1]}: {arms}")
        return 0
    for arm in args.again:
        _forget(runs, arm, sorted({seed for name, seed in wanted if name == arm}))
    failed = {}
    if not args.analyse_only:
        # One thread a run: runs side by side use the cores better than threads of one run.
        os.environ["OMP_NUM_THREADS"] = "1"
        failed = Scheduler(runs, wanted, args.workers, commit()).run()
    from bench.evidence import page

    target = Path(args.output) if args.output else _output(args, folder, tuning)
    # The page is of all that is there, and not only of what this call asked for; where settings
    # are others than the packaged ones, not every arm need be possible.
    every = [arm for name in matrix.sections_of(args.world) for arm in SECTIONS[name].arms]
    shown = list(dict.fromkeys((arm for arm, _ in wanted) if runs.extra else every))
    print(page.write(runs, shown, target, args.world))
    if failed:
        names = ", ".join(f"{step.name} seed {step.seed}" for step in failed.values())
        print(f"evidence: failed, and missing above: {names}", file=sys.stderr)
    return 1 if failed else 0


def order(
    sections: Sequence[str], seeds: dict[str, list[int]], only: Sequence[str] = ()
) -> list[tuple[str, int]]:
    """The main section seed by seed, then the others together seed by seed: whenever the study
    is stopped, what is there can be compared."""
    parts = [[name for name in sections if name == "main"]]
    parts.append([name for name in sections if name != "main"])
    found: dict[tuple[str, int], None] = {}
    for part in parts:
        for seed in sorted({seed for name in part for seed in seeds[name]}):
            for name in part:
                for arm in SECTIONS[name].arms if seed in seeds[name] else ():
                    if not only or arm in only:
                        found[arm, seed] = None
    return list(found)


def _sections(args: argparse.Namespace) -> list[str]:
    there = matrix.sections_of(args.world)
    if not args.section:
        return [
            name
            for name in there
            if not args.quick or args.world != "toy" or name in quick.SECTIONS
        ]
    names = args.section.split(",")
    for name in names:
        if name not in there:
            meant = did_you_mean(name, there)
            raise StudyError(f"--section {name}: no such section{meant}; {', '.join(there)}")
    return names


def _arms(args: argparse.Namespace) -> Sequence[str]:
    if not args.arms:
        return quick.ARMS if args.quick and args.world == "toy" else ()
    names = args.arms.split(",")
    for name in names:
        if name not in ARMS:
            raise StudyError(f"--arms {name}: no such arm{did_you_mean(name, list(ARMS))}")
    return names


def _seeds(args: argparse.Namespace, section: str) -> list[int]:
    if not args.seeds:
        return [1, 2] if args.quick else list(range(1, SECTIONS[section].seeds + 1))
    seeds: list[int] = []
    for part in args.seeds.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise StudyError(f"--seeds {args.seeds}: want numbers and ranges, for example 1-5,8")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise StudyError(f"--seeds {args.seeds}: names no seed")
    tuning = [seed for seed in seeds if seed in TUNING_SEEDS]
    if 0 in seeds or (tuning and len(tuning) < len(seeds)):
        raise StudyError(
            f"--seeds {args.seeds}: 0 and {TUNING_SEEDS[0]}-{TUNING_SEEDS[-1]} are for choosing "
            "defaults and cannot be reported; the latter may run by themselves"
        )
    return sorted(set(seeds))


def _forget(runs: Study, arm: str, seeds: Sequence[int]) -> None:
    if arm not in ARMS:
        raise StudyError(f"--again {arm}: no such arm{did_you_mean(arm, list(ARMS))}")
    for seed in seeds:
        if runs.result(arm, seed) is not None:
            runs.store.forget(runs.found.pop((arm, seed)))


def _output(args: argparse.Namespace, folder: Path, tuning: bool) -> Path:
    """Only evidence goes among the results that are kept."""
    own = args.quick or tuning or args.set
    return folder / "report" if own else ROOT / "bench" / "results"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--world", default="toy", choices=("toy", *matrix.STUDIES), help="whose study"
    )
    parser.add_argument("--section", default="", help="sections, with commas between")
    parser.add_argument("--arms", default="", help="of these sections only some arms")
    parser.add_argument("--seeds", default="", help="for example 1-5 or 1,2,7")
    parser.add_argument("--workers", type=int, default=cores(), help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--analyse-only", action="store_true", help="run nothing")
    parser.add_argument("--again", action="append", default=[], metavar="ARM", help="drop results")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs: a setting"
    )
    parser.add_argument("--list", action="store_true", help="sections, seeds and arms")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "evidence"), help="results so far")
    parser.add_argument("--output", default="", help="where the page goes")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: want 1 or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
