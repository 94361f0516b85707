"""A call that may never come back ends the process instead, in words."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

HELD = 15.0
"""Seconds more for a call that holds Python's lock, in which no thread can speak."""


class Watchdog:
    """with watchdog("generate"): ... heard() ... ends the process after `seconds` of silence.

    An exception cannot reach a thread that waits in a kernel or a collective, so the process ends:
    what torchrun then does to the other ranks, and `--resume` after it, is what happens when a rank
    dies. Every thread's traceback is printed.
    """

    def __init__(self, seconds: float, key: str, who: str) -> None:
        self.seconds, self.key, self.who = seconds, key, who

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        over = threading.Event()
        self.heard()
        watcher = threading.Thread(target=self._watch, args=(what, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            faulthandler.cancel_dump_traceback_later()

    def heard(self) -> None:
        self.last = time.monotonic()
        where = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback_later(self.seconds + HELD, exit=True, file=where)

    def _watch(self, what: str, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.seconds:
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                print(
                    f"gi: {self.key}={self.seconds:g}: {self.who}: no sign of life for so many "
                    f"seconds from: {what}. This process ends; what hangs is above. Checkpoints "
                    "are intact: --resume goes on from the newest",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(1)
