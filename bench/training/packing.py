"""Packed against padded sequences: tokens a second, forward and backward, on ragged lengths.

    python -m bench.training.packing [hidden] [layers]

Three ways through the same sequences: padded in micro-batches as they come, padded in the trainer's
micro-batches (sorted by length), packed; and prompts with four answers each, every prompt computed
for each of them or once. Interleaved; medians.
"""

import statistics
import sys
import time
from collections.abc import Iterable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer.batch.sequences import Sequences, micro_batches
from trainer.models import packing
from trainer.models.policy import Policy, log_probabilities


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
    alone = Sequences.of([x[:4] for x in draw], [x[4:] for x in draw])
    asked = [torch.randint(1, 512, (128,)).tolist() for _ in range(16)]
    four = [prompt for prompt in asked for _ in range(4)]
    same = {shared: Sequences.of(four, [x[4:] for x in draw], shared) for shared in (False, True)}
    budget, tokens = 4096, sum(lengths)
    by_length = micro_batches(lengths, budget)
    ways = {
        "padded": (alone, torch.arange(64).split(max(1, budget // max(lengths)))),
        "padded, sorted": (alone, by_length),
        "packed": (alone, by_length),
        "packed, 4 answers each": (same[False], [p.rows for p in same[False].pieces(budget)]),
        "packed, prompts shared": (same[True], [p.rows for p in same[True].pieces(budget)]),
    }

    def run(sequences: Sequences, pieces: Iterable[torch.Tensor]) -> float:
        began = time.perf_counter()
        for rows in pieces:
            stats = policy(sequences.rows(rows), log_probabilities())
            (stats.logprobs.sum() / sequences.count).backward()
        policy.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(6):
        for name, (sequences, pieces) in ways.items():
            if name.startswith("packed"):
                packing.use_packed(model)
            else:
                model.set_attn_implementation("sdpa")
            seconds[name].append(run(sequences, pieces))
    padding = len(lengths) * max(lengths) / tokens
    which = packing.kernel(device, next(model.parameters()).dtype)
    print(f"{device}, {tokens} tokens in {len(lengths)} sequences, padded to {padding:.2f} times")
    for name, all_seconds in seconds.items():
        median, count = statistics.median(all_seconds[1:]), len(ways[name][0].tokens)
        first = statistics.median(
            seconds["padded" if count == tokens else "packed, 4 answers each"][1:]
        )
        kind = f" ({which})" if name.startswith("packed") else ""
        print(f"{name + kind:<34} {count / median:>10.0f} tokens/s   {first / median:.2f}x")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
