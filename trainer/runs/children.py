"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PARENT, PR_SET_PDEATHSIG = "GI_PARENT", 1


def start(
    arguments: Sequence[str], log: Path, again: bool, environment: Mapping[str, str]
) -> subprocess.Popen:
    """`gi` with these arguments; what it says goes to `log`, behind what is there if `again`."""
    with log.open("a" if again else "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, PARENT: str(os.getpid())},
        )


def die_with_parent() -> None:
    """In a process of `start`, first of all: kill -9 of the parent ends this one too.

    Nothing is lost by it, for a run survives a kill at any moment; an orphan would go on writing
    into a folder that the next start works in.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it was gone before we had said so
        os._exit(128 + signal.SIGKILL)
