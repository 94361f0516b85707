"""Peak memory of PPO steps of a random 0.5B model with adapters of rank 16 on this CPU.

    python -m bench.training.lora_memory     wants 4 GiB of free memory, 1 GiB of disk, some minutes

The base in bfloat16, and of policy and critic their adapters, with gradients and AdamW's moments in
float32, are what has to be there; the bar is 1.35 times that. Measured is what the process takes
on top of what it had after a step of a tiny model (Python and libraries); the dry run, which counts
no libraries either, has to be within 15 % of it. Policy, reference and critic stand on one base,
and answers are sampled from it, too. Rewards are a function.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.host.process import CLEAR, resident
from bench.training.memory import SETTINGS, SHAPE, make

LORA = [
    *(each for each in SETTINGS if not each.startswith("ppo.advantages")),
    "lora.rank=16",
    "model.dtype=bfloat16",
    "ppo.prompts_per_step=2",
    "ppo.steps=2",
    "rollout.logprob_bound=1",
    "rollout.max_new_tokens=8",
    "rollout.batch=4",
    "trainer.tokens_per_microbatch=64",
]
STEPS = 2


def step(folder: str, output: str) -> None:
    from trainer.cli import memory
    from trainer.cli.check import check
    from trainer.config import load
    from trainer.models import backbone
    from trainer.ppo import build, loop
    from trainer.runs.folder import RunFolder

    config = load("toy", [*LORA, f"model.policy={folder}", f"run.output={output}"])
    checked = check(config, ("ppo",))
    plan = memory.plan(config, ("ppo",), checked.policy, ranks=1)
    first = load("toy", [*LORA, f"run.output={output}/first"])  # libraries load as they are used
    loop.iteration(build.Setup.of(first, RunFolder(f"{output}/first")), 0)
    gc.collect()
    before = resident("VmRSS")
    CLEAR.write_text("5")
    began = time.perf_counter()
    t = build.Setup.of(config, RunFolder(output))
    loaded = resident("VmRSS")
    metrics = [loop.iteration(t, i) for i in range(STEPS)]
    seconds = (time.perf_counter() - began) / STEPS
    assert all(each["policy/grad_norm"] > 0 for each in metrics)
    trained = [
        p for model in (t.actors.policy, t.actors.critic) for p in backbone.trained(model).values()
    ]
    base = [p for n, p in t.actors.policy.named_parameters() if "lora_" not in n]
    told = {
        "before": before,
        "loaded": loaded,
        "peak": resident("VmHWM"),
        "base": sum(p.nbytes for p in base),
        "trained": sum(4 * p.nbytes for p in trained),  # master, gradient, two moments
        "parts": plan.columns["ppo"],
        "estimate": plan.most["ppo"],
        "seconds": seconds,
    }
    print(json.dumps(told))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:

        def run(*arguments: str) -> str:
            line = [sys.executable, "-m", "bench.training.lora_memory", *arguments]
            return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout

        run("make", str(Path(folder, "model")))
        found = json.loads(run("step", str(Path(folder, "model")), folder).splitlines()[-1])
    for name, size in found["parts"].items():
        print(f"  {name:<18} {size / 2**30:6.2f} GiB")
    needed, took = found["base"] + found["trained"], found["peak"] - found["before"]
    print(f"base {found['base'] / 2**30:.2f} GiB, trained {found['trained'] / 2**30:.2f}")
    print(
        f"resident before {found['before'] / 2**30:.2f} GiB, with the models "
        f"{found['loaded'] / 2**30:.2f}, at most {found['peak'] / 2**30:.2f}"
    )
    print(f"models and steps took {took / 2**30:.2f} GiB: {took / needed:.3f}x (bar 1.35)")
    estimate = found["estimate"]
    print(f"dry run says {estimate / 2**30:.2f} GiB: {estimate / took - 1:+.1%} (bar 15 %)")
    print(f"one step took {found['seconds']:.1f} s")
    return int(took > 1.35 * needed or abs(estimate / took - 1) > 0.15)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], "bfloat16", SHAPE)
    elif sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        sys.exit(main())
