"""Peak memory of one PPO step of a random 0.5B model on this CPU, against what has to be there.

    python -m bench.training.memory    wants 14 GiB of free memory, 4 GiB of disk, some minutes

Weights, gradients, AdamW's two moments and the frozen reference, all in float32, are what no
trainer of this kind can do without; the bar is 1.3 times their sum. The dry run's estimate has to
be within 15 % of what was measured. No critic and no reward model: rewards are a function, and a
prompt's answers are compared with one another.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {  # of Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SETTINGS = [
    "run.stages=[ppo]",
    "reward.model_weight=0",
    "reward.functions=[{function: 'bench.training.memory:varied'}]",
    "model.critic=policy",
    "model.gradient_checkpointing=true",
    "groups.inference=none",
    "ppo.advantages=leave_one_out",
    "ppo.samples_per_prompt=2",
    "ppo.prompts_per_step=4",
    "ppo.minibatches=1",
    "ppo.ppo_epochs=1",
    "ppo.critic_warmup_steps=0",
    "ppo.steps=1",
    "rollout.batch=8",
    "rollout.logprob_bound=0.01",
    "data.eval_prompts=",
    "data.ood_prompts=",
    "trainer.tokens_per_microbatch=256",
    "trainer.save_every=0",
    "toy.prompts=64",
    "baselines={}",
]


def varied(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
    """Whatever a random model says, there is something to learn."""
    return [float(i % 3) for i in range(len(answers))]


def make(folder: str, dtype: str = "float32", shape: dict[str, Any] = SHAPE) -> None:
    """In a process of its own: what it needed is no part of the peak."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainer.config import load
    from trainer.worlds.toy import World

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    World(load("toy").toy).tokenizer().save_pretrained(folder)


def step(folder: str, output: str) -> None:
    from trainer.cli import memory
    from trainer.cli.check import check
    from trainer.config import load
    from trainer.ppo import build, loop
    from trainer.runs.folder import RunFolder

    config = load("toy", [*SETTINGS, f"model.policy={folder}", f"run.output={output}"])
    checked = check(config, ("ppo",))
    parts = memory.estimate(config, "ppo", checked.policy, checked.policy, 1)
    t = build.Setup.of(config, RunFolder(output))
    began = time.perf_counter()
    metrics = loop.iteration(t, 0)
    seconds = time.perf_counter() - began
    assert metrics["policy/grad_norm"] > 0 and metrics["guard/skipped"] == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": seconds, "estimate": parts}))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:

        def run(*arguments: str) -> str:
            line = [sys.executable, "-m", "bench.training.memory", *arguments]
            return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout

        run("make", str(Path(folder, "model")))
        found = json.loads(run("step", str(Path(folder, "model")), folder).splitlines()[-1])
    names = ("weights", "gradients", "optimiser", "reference")
    needed = sum(found["estimate"][name] for name in names)
    estimate, peak = sum(found["estimate"].values()), found["peak"]
    for name, size in found["estimate"].items():
        print(f"  {name:<18} {size / 2**30:6.2f} GiB")
    print(f"needed {needed / 2**30:.2f} GiB, measured peak {peak / 2**30:.2f} GiB: "
          f"{peak / needed:.3f}x (bar 1.3)")  # fmt: skip
    print(f"dry run says {estimate / 2**30:.2f} GiB: {estimate / peak - 1:+.1%} (bar 15 %)")
    print(f"one step took {found['seconds']:.1f} s")
    return int(peak > 1.3 * needed or abs(estimate / peak - 1) > 0.15)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2])
    elif sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        sys.exit(main())
