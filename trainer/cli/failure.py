"""How a command ends that cannot go on: one line for a person, an exit code, and nothing hidden.

What was foreseen (`for_user` errors) is a line. So is a full disk, memory that is not there, and
another rank's end, of which rank 0 says whose it was and why. Anything else is a bug: one line too,
and its traceback in errors.txt of the run folder; with --debug or GI_TRACEBACK=1 on the terminal.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from trainer.runs.names import one_line

LONGEST = 2000
GOES_ON = "--resume goes on, and torchrun --max-restarts N does so by itself"
_folder: list[Path] = []
"""The run folder, once it is this run's."""


def belongs_to(folder: Path) -> None:
    _folder[:] = [folder]


def end(error: Exception, debug: bool) -> int:
    """Say what happened, once; returns the exit code."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    line, code = explained(error)
    rank = int(os.environ.get("RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _say(line)
        return code
    from trainer import parallel
    from trainer.runs import faults

    if reason := faults.lost_rank(error):
        first = parallel.first_failure()
        if rank == 0 or first is None:
            who = f"{first[1]} (of rank {first[0]})" if first else reason
            _say(f"another rank is gone: {who}; {GOES_ON}", rank)
        return 1
    if parallel.tell_failure(line):
        _say(line, rank)
    return code


def explained(error: Exception) -> tuple[str, int]:
    """A line, and an exit code."""
    if getattr(error, "for_user", False):
        return one_line(error, LONGEST), getattr(error, "code", 2)
    if known := _known(error):
        return one_line(known, LONGEST), 1
    what = one_line(f"{type(error).__name__}: {error}", 300)
    return f"{what} (nobody had thought of this; {_kept(error)})", 1


def _known(error: Exception) -> str | None:
    """What is nobody's bug."""
    if isinstance(error, MemoryError):
        return "out of memory"
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    if name.endswith("OutOfMemoryError"):
        said = str(error).partition(". GPU")[0]
        return f"{said}: lower trainer.tokens_per_microbatch or rollout.batch"
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno and seen.strerror:
            return f"{seen.filename}: {seen.strerror}" if seen.filename else seen.strerror
        if "(os error " in str(seen):  # of a library that is not written in Python
            return str(seen).partition("(os error ")[0].strip()
        seen = seen.__cause__ or seen.__context__
    return None


def _kept(error: Exception) -> str:
    """Where the traceback is."""
    if not _folder:
        return "--debug shows where"
    path = _folder[0] / "errors.txt"
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"rank {os.environ.get('RANK', '0')}, pid {os.getpid()}\n")
            file.writelines(traceback.format_exception(error))
    except OSError:
        traceback.print_exception(error, file=sys.stderr)
        return "its traceback is above"
    return f"its traceback is in {path}"


def _say(line: str, rank: int = 0) -> None:
    prefix = f"rank {rank}: " if rank else ""
    print(f"gi: {prefix}{line}", file=sys.stderr, flush=True)
