"""Processes for tests that want several, forked from a server that has imported what they need.

There is one server in a process that runs tests, so what it imports is said once, here.
"""

import multiprocessing
import time

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["tests.trainer.runs.test_checkpoint", "trainer.stages.registry", "peft"]
)


def started(processes):
    for process in processes:
        process.start()
    return processes


def wait(processes, seconds=90) -> list[int]:
    """Their exit codes; whoever hangs is killed."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    hang = [process.exitcode is None for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert not any(hang), f"hang: {hang}"
    return [process.exitcode for process in processes]
