"""What is done, in order of worth: a run that is cut has done what matters most."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    name: str
    seconds: float  # its limit in a run of four minutes, into which the first five fit
    about: str


STAGES = (
    Stage("versions", 14, "versions, and the two ceilings: a bf16 product and a copy"),
    Stage("selftest", 58, "python -m gikernels.selftest: every op against float64"),
    Stage("triton", 60, "the tests of the Triton and CUDA kernels"),
    Stage("gpu", 44, "the tests that only a GPU can run, but for compute-sanitizer's"),
    Stage("times", 58, "time, memory and error of the operations, beside plain PyTorch"),
    Stage("small", 40, "the head of a small model: D = 896"),
    Stage("peers", 110, "the same operations of others, one after the other"),
    Stage("training", 60, "training steps of a random 0.5B model, beside TRL's"),
    Stage("variants", 50, "the forward in other tiles, for who tunes it"),
)
CHECKS = ("selftest", "triton", "gpu")


def named(names: str) -> tuple[Stage, ...]:
    """Of "times,peers", in the order above; ValueError for a word that is no stage."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in STAGES]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no stage {name!r}, there are {', '.join(known)}")
    return tuple(stage for stage in STAGES if not wanted or stage.name in wanted)
