"""Processes that may be killed, forked from a server that has only imported."""

import os
import signal
import socket

from tests.forkserver import context, started, wait


def start(function, *arguments):
    return started([context.Process(target=_run, args=(function, *arguments))])[0]


def run(function, *arguments) -> int:
    """Exit code; -9 for one that was killed."""
    return wait([start(function, *arguments)])[0]


def _run(function, *arguments):
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def kill_at(stage, step, number=signal.SIGKILL, rank=0):
    """This process gets a signal, of kill -9, when this line of metrics.jsonl has been written."""
    from trainer import parallel
    from trainer.runs.log import MetricsLog

    write = MetricsLog.write

    def write_and_die(self, of, at, *arguments, **labels):
        write(self, of, at, *arguments, **labels)
        if (of, at) == (stage, step) and parallel.rank() == rank:
            os.kill(os.getpid(), number)

    MetricsLog.write = write_and_die


def train(overrides, output, stages, resume=False, kill=None):
    """The stages one after another, as `gi train` runs them."""
    from tests.trainer import tiny
    from trainer.runs.folder import RunFolder
    from trainer.stages import registry

    if kill:
        kill_at(*kill)
    run = RunFolder(output)
    config = tiny.config(output, *overrides)
    for stage in stages:
        registry.run(stage, config, run, resume)


def command(arguments, said=None, kill=None):
    """`gi` with these arguments; what it says on stderr goes to the file `said`."""
    import sys

    from trainer.__main__ import main

    if said:
        sys.stderr = open(said, "w")  # noqa: SIM115  (until the process ends)
    if kill:
        kill_at(*kill)
    code = main([str(each) for each in arguments])
    sys.stderr.flush()
    if code:
        os._exit(code)


def command_on_rank(arguments, folder, kill=None):
    command(arguments, f"{folder}/rank{os.environ['RANK']}.txt", kill)


def ranks(count, function, *arguments):
    """function(*arguments) on this many ranks; their processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_as_rank, args=(rank, count, port, function, *arguments))
        for rank in range(count)
    ]
    return started(processes)


def run_ranks(count, function, *arguments) -> list[int]:
    return wait(ranks(count, function, *arguments))


def _as_rank(rank, count, port, function, *arguments):
    from trainer import parallel

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    parallel.start()
    _run(function, *arguments)
    parallel.stop()
