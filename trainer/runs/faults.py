"""What may go wrong while a run trains, and how it ends: in one line a person can act on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor

from trainer import parallel
from trainer.runs.console import say


class RunError(RuntimeError):
    """Ends the run with one line on the terminal and this exit code."""

    for_user, code = True, 1


class Stopped(RunError):
    """Asked to stop, and did, with a checkpoint. 143 = 128 + SIGTERM: schedulers start it again."""

    code = 128 + signal.SIGTERM


def lost_rank(error: BaseException) -> str | None:
    """What the collective said that failed because another rank is gone; None for other errors."""
    signs = (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out",
        "Socket closed", "remote process exited", "NCCL", "Gloo",
    )  # fmt: skip
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in signs):
        return None
    return str(error).strip().splitlines()[0]


class Diverged(RunError):
    """Too many steps in a row were not finite."""


class Guard:
    """Nothing is learnt from what is not finite, on any rank: skipped, counted and said.

        if guard.allows("policy", loss=loss, gradient=norm):  # else on no rank
            update()
        ...
        guard.step_is_over("ppo", step)  # raises after `limit` bad ones in a row

    The weights stay as they are, so one bad batch costs one update. What makes every step bad (a
    learning rate, a broken reward) stops the run, and no checkpoint is taken meanwhile.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0  # updates, since the stage began
        self.in_a_row = 0  # steps
        self.found: list[str] = []  # in this step

    def allows(self, what: str, **values: Tensor | None) -> bool:
        bad = [
            name
            for name, value in values.items()
            if value is not None and not bool(parallel.local(value.detach()).isfinite().all())
        ]
        bad = [name for part in parallel.gather_objects(bad) for name in part]
        if bad:
            self.skipped += 1
            self.found.append(f"{what} ({', '.join(dict.fromkeys(bad))})")
        return not bad

    def step_is_over(self, stage: str, step: int) -> bool:
        """Whether all of the step was finite."""
        if not self.found:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        found, self.found = ", ".join(dict.fromkeys(self.found)), []
        say(f"{stage}: step {step}: not finite: {found}; skipped on all ranks")
        if self.in_a_row >= self.limit:
            raise Diverged(
                f"{stage}: {self.in_a_row} steps in a row were not finite, the last {step}: "
                f"{found}; the checkpoints there are older. Lower the learning rate, or look at "
                "the rewards, and go on with --resume"
            )
        return False

    def state_dict(self) -> dict:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["skipped"]


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


@contextmanager
def ends_at_sigterm() -> Iterator[None]:
    """Around stages: what is between their loops, such as sampling pairs, ends at SIGTERM as the
    loops do, with one line. It can be done again at any place, so it ends at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped("stopped by SIGTERM outside the steps of a stage. --resume goes on")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
