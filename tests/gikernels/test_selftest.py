"""python -m gikernels.selftest: it passes here, and it can fail."""

import os
import subprocess
import sys

import pytest
import torch

from gikernels import selftest
from gikernels.backends.dispatch import interpreting

BY_NAME = {case.name: case for case in selftest.CASES}


def test_the_command_line():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gikernels.selftest", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert {row[0] for row in rows} == set(BY_NAME)
    assert {row[3] for row in rows} == {"1", "129", "897"}
    assert done.stdout.endswith("all right\n")


@pytest.mark.skipif(not interpreting(), reason="the command line has run the kernels themselves")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rows", (1, 17))
@pytest.mark.parametrize("name", [c.name for c in selftest.CASES if "triton" in c.backends])
def test_kernels(name, rows):
    result = selftest.check(BY_NAME[name], "triton", torch.float32, rows, "cpu")
    assert not result.problem, result


def test_what_is_off_is_told(monkeypatch, capsys):
    gae = BY_NAME["gae"]

    def off(**given):
        out = gae.ours(**given)
        return out._replace(returns=out.returns + 1e-2)

    def missing(**given):
        return gae.ours(**given)[:1]

    def broken(**given):
        raise RuntimeError("boom")

    for ours, said in ((off, "off: "), (missing, "ValueError"), (broken, "RuntimeError: boom")):
        monkeypatch.setattr(selftest, "CASES", (gae._replace(ours=ours, backends=("reference",)),))
        assert selftest.main(["--device", "cpu"]) == 1
        told = capsys.readouterr().out
        assert said in told and told.endswith("3 off\n")


def test_a_gpu_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert selftest.main(["--device", "cuda"]) == 2
    assert "torch.cuda.is_available()" in capsys.readouterr().err
