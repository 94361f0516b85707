"""Packed against padded sequences: tokens a second, forward and backward, on ragged lengths.

    python -m bench.training.packing [hidden] [layers]

Three ways through the same sequences: padded in micro-batches as they come, padded in the trainer's
micro-batches (sorted by length), packed. Interleaved; medians.
"""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer.batch.sequences import Sequences, micro_batches
from trainer.models import packing
from trainer.models.policy import Policy


def main(hidden: int = 256, layers: int = 4) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    if device == "cuda":
        model.bfloat16()
    policy = Policy(model)
    # Lengths of real answers: many short ones, a few long.
    lengths = (torch.randn(64) * 0.9 + 4).exp().clamp(8, 512).int().tolist()
    draw = [torch.randint(1, 512, (n,)).tolist() for n in lengths]
    sequences = Sequences.of([x[:4] for x in draw], [x[4:] for x in draw], 0).to(device)
    budget, tokens = 4096, sum(lengths)

    def run(pieces) -> float:
        began = time.perf_counter()
        for rows in pieces:
            (policy(sequences.rows(rows)).logprobs.sum() / tokens).backward()
        policy.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    as_they_come = torch.arange(64, device=device).split(max(1, budget // max(lengths)))
    by_length = micro_batches(sequences.lengths, budget)
    ways = {"padded": as_they_come, "padded, sorted": by_length, "packed": by_length}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(6):
        for name, pieces in ways.items():
            if name == "packed":
                packing.use_packed(model)
            else:
                model.set_attn_implementation("sdpa")
            seconds[name].append(run(pieces))
    padding = len(lengths) * max(lengths) / tokens
    which = packing.kernel(device, next(model.parameters()).dtype)
    print(f"{device}, {tokens} tokens in {len(lengths)} sequences, padded to {padding:.2f} times")
    first = statistics.median(seconds["padded"][1:])
    for name, all_seconds in seconds.items():
        median = statistics.median(all_seconds[1:])
        kind = f" ({which})" if name == "packed" else ""
        print(f"{name + kind:<24} {tokens / median:>10.0f} tokens/s   {first / median:.2f}x")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
