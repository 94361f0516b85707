"""What may go wrong while a run trains, and how it ends: in one line a person can act on."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class RunError(RuntimeError):
    """Ends the run with one line on the terminal and this exit code."""

    code = 1


class Stopped(RunError):
    """Asked to stop, and did, with a checkpoint. 143 = 128 + SIGTERM: schedulers start it again."""

    code = 128 + signal.SIGTERM


class StopSignal:
    """Inside, SIGTERM is noted instead of obeyed: the loop looks at `.came` when a step is whole.

    A second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> StopSignal:
        # Signal handlers belong to the main thread; elsewhere (a notebook's worker) SIGTERM kills.
        self.mine = threading.current_thread() is threading.main_thread()
        if self.mine:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.mine:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
