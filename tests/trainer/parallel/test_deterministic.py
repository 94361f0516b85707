"""trainer.deterministic: what it switches, and that nothing of a step is refused by it."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer import children, tiny
from trainer.config import ConfigError
from trainer.models import packing
from trainer.ppo import build, loop


def trains(output):
    from trainer.__main__ import main

    settings = [*tiny.SMALL, "sft.steps=2", "trainer.deterministic=true"]
    assert main(["sft", "toy", *settings, "--output", str(output)]) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_run_switches_it_on(tmp_path):
    assert children.run(trains, tmp_path) == 0


def test_vllm_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"want hf with trainer\.deterministic=true"):
        tiny.config(tmp_path, "trainer.deterministic=true", "rollout.engine=vllm")


class Refused(TorchDispatchMode):
    """Of the operations that torch refuses in this mode on a GPU those that a trainer might use."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        refused = name in ("kthvalue", "histc", "put_", "median", "nll_loss2d_forward")
        refused |= name == "cumsum" and args[0].is_floating_point()
        refused |= name == "bincount" and len(args) > 1 and args[1] is not None
        if refused:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [(), ("groups.objective=cvar",), ("groups.inference=adversarial",)],
    ids=["exact", "cvar", "adversarial"],
)
def test_an_iteration_asks_for_nothing_that_is_refused_on_a_gpu(fresh, monkeypatch, overrides):
    config, run = fresh("ppo.steps=1", *overrides)
    t = build.Setup.of(config, run)
    with Refused() as mode:
        loop.iteration(t, 0)
    assert not mode.seen
    with mode:
        torch.ones(3).cumsum(0)
    assert mode.seen == {"cumsum"}


def test_flash_attention_is_asked_for_its_deterministic_backward(monkeypatch):
    asked = []

    def flash_attn_varlen_func(q, *_, **options):
        asked.append(options["deterministic"])
        return q

    fake = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(packing, "kernel", lambda *_: "flash-attn")
    x, bounds = torch.randn(1, 2, 5, 4), torch.tensor([0, 5], dtype=torch.int32)
    packed = packing.Packed(bounds, bounds, None, 128, 128, (), None)
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            packing.packed_attention(torch.nn.Module(), x, x, x, None, packed=packed)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]
