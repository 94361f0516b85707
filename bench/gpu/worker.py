"""The process of a stage:  python -m bench.gpu.worker STAGE --folder DIR --device cuda

Its exit code says how it ended: 0 done, 81 a check is red, 82 what it needs is missing, else a
crash.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from bench.gpu.record import Missing, Record, Red
from bench.gpu.runner import CODE_FAILED, CODE_MISSING
from bench.gpu.stages import STAGES

CODE_CRASHED = 70


def dies_with(parent: int) -> None:
    """Whoever is killed cannot kill; what went on running would be measured by the next call. The
    parent says its own number: it may be gone before anybody here could ask."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def carry_out(stage: str, record: Record, device: str, limit: float) -> None:
    """Imports what the stage needs and no more: the tests' process is not to hold a GPU context."""
    if stage == "versions":
        from bench.gpu import ceilings

        ceilings.run(record, device)
    elif stage in ("selftest", "triton", "gpu"):
        from bench.gpu import checks

        {"selftest": checks.selftest, "triton": checks.triton, "gpu": checks.gpu}[stage](
            record, device
        )
    elif stage == "training":
        from bench.gpu import training

        training.run(record, device, limit)
    else:
        from bench.gpu import times

        {"times": times.times, "small": times.small, "peers": times.others,
         "variants": times.variants}[stage](record, device)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu.worker")
    parser.add_argument("stage", choices=[stage.name for stage in STAGES])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--parent", type=int, help="the process to end with, with all of the group")
    args = parser.parse_args()
    if args.parent is not None and os.getpgrp() == os.getpid():
        dies_with(args.parent)
    record = Record(args.folder, args.stage)
    try:
        carry_out(args.stage, record, args.device, args.limit)
    except Red as error:
        record.because(str(error))
        return CODE_FAILED
    except Missing as error:
        record.because(str(error))
        return CODE_MISSING
    except Exception:
        traceback.print_exc()
        return CODE_CRASHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
