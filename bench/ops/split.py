"""How much memory each rank needs where a vocabulary is split over several.

    python -m bench.ops.split                 two ranks of a CPU, N 2048, D 256, V 32768
    python -m bench.ops.split --ranks 4 --vocab 131072

A forward and backward of `linear_logprobs`, extra memory at its peak: the gradients of this rank
and all scratch. Once by PyTorch's allocations, which are the same in every run, and once by the
resident set (the median of five calls), which has what libraries take as well. Each rank and the
whole head have a process of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from bench.host.process import CLEAR
from bench.ops import memory
from bench.ops.cases import head_inputs
from gikernels import linear_logprobs


def step(
    rows: int, hidden: int, vocab: int, vocab_group: dist.ProcessGroup | None = None
) -> Callable[[], None]:
    """A forward and backward of this rank's part of the vocabulary, `vocab` tokens."""
    shape = {"N": rows, "D": hidden, "V": vocab}
    i = head_inputs(shape, torch.float32, torch.device("cpu"))
    leaves = [i[name].requires_grad_() for name in ("hidden", "weight")]

    def run() -> None:
        stats = linear_logprobs(*leaves, i["targets"], vocab_group=vocab_group)
        torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), leaves)

    return run


def extra_memory(rows: int, hidden: int, vocab: int, ranks: int) -> dict[str, int]:
    """Bytes of this rank."""
    group = dist.group.WORLD if ranks > 1 else None
    step(128, hidden, 1000, group)()  # loads libraries and starts threads
    run = step(rows, hidden, vocab, group)
    found = {"allocations": memory.counted(run)}
    if CLEAR.exists():  # Linux
        found["resident set"] = int(median(memory.here(run) for _ in range(5)))
    return found


def as_rank(rank: int, ranks: int, shape: tuple[int, int, int], folder: str) -> None:
    torch.set_num_threads(1)
    rows, hidden, vocab = shape
    if ranks > 1:
        store = f"file://{folder}/store{ranks}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    size = vocab // ranks + (rank < vocab % ranks)
    torch.save(extra_memory(rows, hidden, size, ranks), f"{folder}/{rank}_of_{ranks}")
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.ops.split")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    args = parser.parse_args()
    shape = (args.rows, args.hidden, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, args.ranks):
            torch.multiprocessing.spawn(as_rank, (ranks, shape, folder), nprocs=ranks)
        saved = sorted(Path(folder).glob(f"*_of_{args.ranks}"))
        of_ranks = [torch.load(path) for path in saved]
        whole = torch.load(Path(folder) / "0_of_1")
    print(f"N {args.rows}, D {args.hidden}, V {args.vocab} over {args.ranks} ranks, fp32, on a CPU")
    for method, all_of_it in whole.items():
        most = max(found[method] for found in of_ranks)
        print(
            f"{method:14} one rank {all_of_it / 2**20:6.1f} MiB, each of {args.ranks} at most "
            f"{most / 2**20:6.1f} MiB: {most / all_of_it:.3f}x"
        )


if __name__ == "__main__":
    main()
