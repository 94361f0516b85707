"""One run folder, one process: a second start is refused, and says who is there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import IO

from trainer import parallel
from trainer.runs.console import say
from trainer.runs.faults import RunError
from trainer.runs.folder import RunFolder

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

DYING = 10.0
"""Seconds that a process which is no longer there may take to let go of its files."""


class InUse(RunError):
    """Another process works in this folder."""


@contextlib.contextmanager
def held(run: RunFolder) -> Iterator[None]:
    """The folder, made where it is not there, is this run's alone, on all of its ranks."""
    file, problem = None, None
    if parallel.is_main():
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            file = run.lock.open("a+")
            problem = _take(file, run)
        except OSError as error:
            problem = f"{error.filename or run.path}: {error.strerror}"
    problem = next((each for each in parallel.gather_objects(problem) if each), None)
    try:
        if problem:
            raise InUse(problem)
        yield
    finally:
        if file is not None:
            file.close()  # and with it the lock; the system does so for a process that is killed


def _take(file: IO[str], run: RunFolder) -> str | None:
    if fcntl is None:
        return None
    until = time.monotonic() + DYING
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            if _alive(pid) or time.monotonic() > until:
                who = f" by pid {pid}" if pid else ""
                return f"{run.path}: in use{who}; wait for it, stop it, or choose another --output"
            time.sleep(0.05)
        except OSError as error:
            say(f"{run.path}: no locks on this file system ({error.strerror}): start one run only")
            break
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return None


def holder(run: RunFolder) -> int | None:
    """The process of this machine that works in the folder, for those who only look."""
    try:
        pid = run.lock.read_text(encoding="utf-8", errors="replace").strip()[:20]
    except OSError:
        return None
    return int(pid) if pid.isascii() and pid.isdigit() and _alive(pid) else None


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
