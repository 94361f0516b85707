"""Weights of a random 0.5B model from the trainer into vLLM, against what has to be done anyway.

    .venv-vllm/bin/python -m bench.training.sync [float32 | bfloat16]     wants 8 GiB of free memory
    torchrun --nproc-per-node 2 -m bench.training.sync                    from FSDP2's shards

What has to be done: one copy of the weights in memory, in the engine's dtype, and vLLM's own
loading of ready tensors. The bar is 1.5 times their sum (one rank; with several, the gathering
comes on top). Interleaved, medians. Log-probabilities tell that the weights arrived, and the peak
of memory that the model is never there twice.
"""

import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.host.process import CLEAR, resident
from bench.training.memory import SHAPE
from trainer import parallel
from trainer.config import load
from trainer.models import policy
from trainer.ppo.forward import check_engine
from trainer.rollout.make import make_engine
from trainer.worlds.toy import World

ROUNDS = 5
BUCKET = 64  # MiB; the embeddings alone are 260 (bfloat16)


def main(dtype: str = "bfloat16") -> int:
    parallel.start()
    bound = {"float32": 1e-3, "bfloat16": 0.3}[dtype]
    config = load(
        "toy",
        [
            *("rollout.engine=vllm", f"model.dtype={dtype}", "rollout.max_num_seqs=8"),
            *(f"rollout.sync_bucket_mb={BUCKET}", f"rollout.logprob_bound={bound}"),
        ],
    )
    torch.manual_seed(0)
    policy = policy.Policy(Qwen2ForCausalLM(Qwen2Config(**SHAPE))).eval()
    policy = parallel.place(policy, config)
    engine = make_engine(config, World(config.toy).tokenizer())
    engine.sync(policy)  # starts it
    wanted = getattr(torch, dtype)

    def copy() -> list[tuple[str, torch.Tensor]]:
        return [
            (name, p.detach().to(wanted, copy=True)) for name, p in policy.model.named_parameters()
        ]

    def timed(do) -> float:
        parallel.barrier()
        began = time.perf_counter()
        do()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"copy": [], "vLLM's load": [], "sync": []}
    for _ in range(ROUNDS):
        seconds["sync"].append(timed(lambda: engine.sync(policy)))
        if parallel.world_size() == 1:  # else there is nothing whole to copy
            seconds["copy"].append(timed(copy))
            ready = copy()
            seconds["vLLM's load"].append(timed(lambda ready=ready: engine.vllm.load(ready)))
            del ready
    CLEAR.write_text("5")
    before = resident("VmRSS")
    engine.sync(policy)
    extra = resident("VmHWM") - before

    prompts = [list(range(5, 25)) for _ in range(4)]
    rollout = engine.generate(prompts, 2, parallel.generator("sync"))
    difference = check_engine(config, engine, rollout, policy)
    parallel.stop()
    if parallel.rank():
        return 0
    size = engine.synced.bytes
    for name, all_seconds in seconds.items():
        if all_seconds:
            print(f"{name:<12} {1000 * statistics.median(all_seconds):8.0f} ms")
    print(f"{size / 2**20:.0f} MiB in {dtype}; {extra / 2**20:.0f} MiB more memory at the peak")
    print(f"log-probabilities differ by {difference:.2g} at most")
    if not seconds["copy"]:
        return 0
    needed = statistics.median(seconds["copy"]) + statistics.median(seconds["vLLM's load"])
    ratio = statistics.median(seconds["sync"]) / needed
    print(f"sync is {ratio:.2f}x of copy and load (bar 1.5)")
    return int(ratio > 1.5 or extra > size)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
