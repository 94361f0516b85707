"""Runs stages, each in a process of its own with its own limit, within a number of seconds.

A stage that is cut, crashes or hangs costs its own time and nothing else; what has been found is in
the folder already. Another call with the same folder does what is not done, and what was half done
goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import record
from bench.gpu.stages import Stage
from bench.host.machine import ROOT

CODE_FAILED, CODE_MISSING = 81, 82  # of a worker; anything else but 0 is a crash
STARTS = 3  # of a stage that crashes but has got further: one bad case is not to cost the others
STRETCH = 4.0  # at most so many times a stage's limit where there is time
RESERVE = 4.0  # seconds for writing, and for a process that has to be killed


class Ending(NamedTuple):
    code: int | None  # None: it was cut at its limit
    last_words: str = ""


Start = Callable[[Stage, float], Ending]


def launch(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> Ending:
    """The command and all its children, at most `limit` seconds."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            with contextlib.suppress(ProcessLookupError):  # and whatever it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return Ending(code, next((line for line in reversed(lines) if line), ""))


def run(
    stages: Sequence[Stage],
    folder: Path,
    seconds: float,
    start: Start,
    *,
    context: dict[str, Any],  # what a result is of: sources, device, size
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The records of all `stages` in their order; those that are settled are left as they are."""
    began, out = clock(), []
    kept = {stage.name: _kept(folder, stage, context) for stage in stages}
    todo = [s for s in stages if (kept[s.name] or {}).get("status") not in record.SETTLED]
    wanted = sum(stage.seconds for stage in todo) or 1.0
    stretch = min(STRETCH, max(1.0, (seconds - RESERVE) / wanted))
    for stage in stages:
        if stage not in todo:
            data = kept[stage.name]
            say(f"{stage.name:10} {data['status']}, before")
            out.append(data)
            continue
        left = seconds - (clock() - began)
        data = {"stage": stage.name, "status": record.RUNNING, "reason": "", **context}
        data["found"] = (kept[stage.name] or {}).get("found", {})
        path = folder / f"{stage.name}.json"
        if left < stage.seconds:
            data["status"] = record.NO_TIME
            data["reason"] = f"its limit is {stage.seconds:.0f} s, {max(left, 0):.0f} s were left"
        else:
            limit = min(stage.seconds * stretch, left)
            data["limit"] = round(limit, 1)
            record.write(path, data)
            say(f"{stage.name:10} {stage.about} (at most {limit:.0f} s) ...")
            before = clock()
            for _ in range(STARTS):
                ending = start(stage, limit - (clock() - before))
                last, data = data, record.read(path) or data
                data["seconds"] = round(clock() - before, 1)
                data["status"], reason = _verdict(ending, limit)
                stuck = data["found"] == last["found"] or limit - data["seconds"] < RESERVE
                if data["status"] != record.CRASHED or stuck:
                    break
                say(f"{stage.name:10} crashed and goes on: {reason}")
            data["reason"] = data["reason"] or reason
            if data["status"] == record.DONE:
                data["reason"] = ""
        record.write(path, data)
        say(f"{stage.name:10} {data['status']}{': ' * bool(data['reason'])}{data['reason']}")
        out.append(data)
    return out


def _kept(folder: Path, stage: Stage, context: dict[str, Any]) -> dict[str, Any] | None:
    """What a former call found, unless it was of other sources, another device or size."""
    data = record.read(folder / f"{stage.name}.json")
    if data is None or any(data.get(key) != value for key, value in context.items()):
        return None
    return data


def _verdict(ending: Ending, limit: float) -> tuple[str, str]:
    if ending.code is None:
        return record.CUT, f"at its limit of {limit:.0f} s"
    if ending.code == 0:
        return record.DONE, ""
    if ending.code == CODE_FAILED:
        return record.FAILED, ending.last_words
    if ending.code == CODE_MISSING:
        return record.MISSING, ending.last_words
    return record.CRASHED, f"exit code {ending.code}: {ending.last_words}"
