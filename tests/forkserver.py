"""Processes for tests that want several, forked from a server that has imported what they need.

There is one server in a process that runs tests, so what it imports is said once, here.
"""

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["tests.trainer.runs.test_checkpoint", "trainer.stages.registry", "peft"]
)
