"""See the package. The short form, of a minute, runs in the tests."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.attack.kinds import KINDS, Lab, Skipped


def attack(minutes: float, seed: int, only: str = "") -> tuple[Counter, Counter, int, list[str]]:
    """Tried and survived by kind, kills, and what went wrong. 0 minutes: the short form."""
    tried, survived, wrong = Counter(), Counter(), []
    until = time.monotonic() + 60 * minutes
    chosen = {name: each for name, each in KINDS.items() if only in name}
    with tempfile.TemporaryDirectory(prefix="attack") as place:
        lab, turn = Lab(Path(place)), 0
        while turn == 0 or time.monotonic() < until:
            for name, (kind, short, each_turn) in chosen.items():
                for number in range(each_turn if minutes else short):
                    if minutes and turn and time.monotonic() > until:
                        break
                    try:
                        problem = kind(lab, Random(f"{seed} {name} {turn} {number}"))
                    except Skipped as reason:
                        print(f"{name}: skipped: {reason}", file=sys.stderr)
                        break
                    tried[name] += 1
                    survived[name] += problem is None
                    if problem is not None:
                        wrong.append(f"{name} (seed {seed}, turn {turn}, {number}): {problem}")
                        print(wrong[-1], file=sys.stderr, flush=True)
            turn += 1
    return tried, survived, lab.kills, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=0, help="at least one turn of all; 0: the short form"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    asked = parser.parse_args()
    tried, survived, kills, wrong = attack(asked.minutes, asked.seed, asked.only)
    print(f"seed {asked.seed}\n\n| attack | tried | survived |\n|---|---:|---:|")
    for name in tried:
        print(f"| {name} | {tried[name]} | {survived[name]} |")
    print(f"\nkills: {kills}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
