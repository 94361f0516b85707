"""What is measured. Each op is one function, which yields a Case for each shape of a size:

    gpu     shapes of real training runs          cpu     what a laptop can hold
    quick   a smoke run of seconds, anywhere

A new op is a function here, its contenders in peers.py, and an entry in OPS.

N rows (tokens), D hidden, V vocabulary, S sequences, T steps, G groups. Formulas count what the
mathematics needs, not what an implementation does: each input byte is read once, each output byte
written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ops import peers, peers_experience, peers_support, rows
from bench.ops.case import BOTH, FORWARD, Case, Shape, Work, copied, generator
from bench.ops.peers import Inputs, Outputs
from gikernels import reference

# --- the products of a head ---------------------------------------------------------------------


def _products(forward: int, hidden: int, weight: int) -> Callable[[Inputs], Callable[[], Any]]:
    """So many times h @ W.T, dZ @ W and dZ.T @ h, by the library that torch has (cuBLAS, MKL)."""

    def build(inputs: Inputs) -> Callable[[], Any]:
        h, w = inputs["hidden"].detach(), inputs["weight"].detach()
        z = h @ w.T

        def run() -> None:
            for _ in range(forward):
                torch.mm(h, w.T, out=z)
            for _ in range(hidden):
                torch.mm(z, w)
            for _ in range(weight):
                torch.mm(z.T, h)

        return run

    return build


def head_work(shape: Shape, modes: dict[str, tuple[int, int, int]]) -> dict[str, Work]:
    nhv = shape["N"] * shape["D"] * shape["V"]
    return {
        mode: Work(
            2.0 * sum(counts) * nhv,
            "FLOP",
            f"{2 * sum(counts)} N D V",
            f"{sum(counts)} plain matrix product{'s' * (sum(counts) > 1)}",
            _products(*counts),
        )
        for mode, counts in modes.items()
    }


def head_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of unit variance, as those of a trained head are within a few units of each other."""
    n, d, v = shape["N"], shape["D"], shape["V"]
    rng = generator(device)
    return {
        "hidden": torch.randn(n, d, device=device, generator=rng).to(dtype),
        "weight": (torch.randn(v, d, device=device, generator=rng) / d**0.5).to(dtype),
        "targets": torch.randint(v, (n,), device=device, generator=rng),
    }


HEADS = {
    "gpu": (
        {"N": 8192, "D": 4096, "V": 128256},
        {"N": 8192, "D": 4096, "V": 131072},
        {"N": 32768, "D": 4096, "V": 131072},
        {"N": 8192, "D": 896, "V": 151936},
    ),
    "cpu": ({"N": 2048, "D": 256, "V": 32768},),
    "quick": ({"N": 64, "D": 32, "V": 1000},),
}


# Few rows, or few tokens to choose from: what costs there is not the products.
SMALL_ON_CPU = (
    ({"N": 1, "D": 1024, "V": 151936}, torch.bfloat16),
    ({"N": 8, "D": 1024, "V": 151936}, torch.bfloat16),
    ({"N": 100000, "D": 64, "V": 32}, torch.bfloat16),
    ({"N": 100000, "D": 64, "V": 32}, torch.float32),
    ({"N": 1, "D": 64, "V": 1000}, torch.float32),
)


def with_small(shapes: tuple[Shape, ...], size: str) -> Iterator[tuple[Shape, torch.dtype]]:
    """Shapes of a size with their dtype; on a CPU the small ones too."""
    yield from ((shape, dtype_of(size)) for shape in shapes)
    if size == "cpu":
        yield from SMALL_ON_CPU


def dtype_of(size: str) -> torch.dtype:
    return torch.bfloat16 if size == "gpu" else torch.float32


def linear_logprobs(size: str) -> Iterator[Case]:
    def specification(i: Inputs) -> Outputs:
        stats = reference.linear_logprobs(i["hidden"], i["weight"], i["targets"])
        return {"logprobs": stats.logprobs, "entropy": stats.entropy}

    for shape, dtype in with_small(HEADS[size], size):
        yield Case(
            "linear_logprobs",
            shape,
            dtype,
            head_inputs,
            specification,
            ("hidden", "weight"),
            peers.LINEAR_LOGPROBS,
            head_work(shape, {FORWARD: (1, 0, 0), BOTH: (2, 1, 1)}),
            {**shape, "N": min(shape["N"], 128)},
            lambda i, logprobs, entropy: {"logprobs": logprobs, "entropy": entropy},
        )


def linear_logprobs_support(size: str) -> Iterator[Case]:
    """Rows that kept K tokens, as top-p does; a loop of the operation without them beside it."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        i, n, k, v = head_inputs(shape, dtype, device), shape["N"], shape["K"], shape["V"]
        # K of V in steps of the same length from a place of the row's own: all different.
        ids = i["targets"].unsqueeze(1) + torch.arange(k, device=device) * (v // k)
        offsets = torch.arange(n + 1, device=device) * k
        return {**i, "offsets": offsets, "ids": (ids % v).view(-1)}

    def specification(i: Inputs) -> Outputs:
        kept = reference.Support(i["offsets"], i["ids"])
        stats = reference.linear_logprobs(i["hidden"], i["weight"], i["targets"], support=kept)
        return {"logprobs": stats.logprobs, "entropy": stats.entropy}

    def whole(i: Inputs) -> Callable[[], Any]:
        leaves = [i[name].detach().requires_grad_() for name in ("hidden", "weight")]
        own = {**i, "hidden": leaves[0], "weight": leaves[1]}

        def run() -> None:
            stats = peers.gikernels_linear_logprobs(own)
            torch.autograd.grad(stats["logprobs"].sum() + stats["entropy"].sum(), leaves)

        return run

    for shape in HEADS[size][:1]:
        shape = {**shape, "K": 64 if size != "quick" else 16}
        amount = 8.0 * shape["N"] * shape["K"] * shape["D"]
        yield Case(
            "linear_logprobs_support",
            shape,
            dtype_of(size),
            inputs,
            specification,
            ("hidden", "weight"),
            peers_support.LINEAR_LOGPROBS_SUPPORT,
            {BOTH: Work(amount, "FLOP", "8 N K D", "the whole vocabulary (gikernels)", whole)},
            {**shape, "N": min(shape["N"], 128)},
        )


def linear_policy_loss(size: str) -> Iterator[Case]:
    """One advantage for each of 8 sequences, which is all that GRPO-style peers can take."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        i, n, sequences = head_inputs(shape, dtype, device), shape["N"], min(8, shape["N"])
        rng = generator(device)
        with torch.no_grad():
            z = (i["hidden"].float() * i["weight"][i["targets"]].float()).sum(-1)
        # z: the target's logit; log V is near the log-sum-exp of unit normal logits
        here = z - torch.log(torch.tensor(float(shape["V"]))) - 0.5
        advantages = torch.randn(sequences, device=device, generator=rng)
        return {
            **i,
            "old_logprobs": here + 0.2 * torch.randn(n, device=device, generator=rng),
            "ref_logprobs": here + 0.2 * torch.randn(n, device=device, generator=rng),
            "advantages": advantages.repeat_interleave(n // sequences),
            "mask": torch.rand(n, device=device, generator=rng) < 0.9,
            "denom": float(n),
            "sequences": sequences,
        }

    def specification(i: Inputs) -> Outputs:
        stats = reference.linear_logprobs(i["hidden"], i["weight"], i["targets"])
        return peers.policy_loss(stats.logprobs, i)

    for shape, dtype in with_small(HEADS[size], size):
        yield Case(
            "linear_policy_loss",
            shape,
            dtype,
            inputs,
            specification,
            ("hidden", "weight"),
            peers.POLICY_LOSS,
            head_work(shape, {BOTH: (1, 1, 1)}),
            {**shape, "N": min(shape["N"], 128)},
            lambda i, logprobs, entropy: peers.policy_loss(logprobs, i),
        )


def _head_case(op: str, parts: rows.Parts, both: tuple[int, int, int], size: str) -> Iterator[Case]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        return parts.more(head_inputs(shape, dtype, device), generator(device))

    for shape in HEADS[size]:
        forward = 1 if parts.again else both[0]
        work = head_work(shape, {FORWARD: (forward, 0, 0), BOTH: both})
        small = {**shape, "N": min(shape["N"], 128)}
        leaves = ("hidden", "weight")
        yield Case(
            op, shape, dtype_of(size), inputs, parts.specified, leaves, parts.peers, work, small
        )


def linear_gather_logprobs(size: str) -> Iterator[Case]:
    """16 given tokens a row, as of a teacher's top-k. The backward computes the logits again."""
    return _head_case("linear_gather_logprobs", rows.GATHER, (2, 1, 1), size)


def linear_divergence(size: str) -> Iterator[Case]:
    """Jensen-Shannon, against a reference of the same size: two products of logits, once."""
    return _head_case("linear_divergence", rows.DIVERGENCE, (2, 1, 1), size)


# --- from logits --------------------------------------------------------------------------------


def logprobs(size: str) -> Iterator[Case]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        n, v, rng = shape["N"], shape["V"], generator(device)
        return {
            "logits": torch.randn(n, v, device=device, generator=rng, dtype=dtype).mul_(3),
            "targets": torch.randint(v, (n,), device=device, generator=rng),
        }

    def specification(i: Inputs) -> Outputs:
        stats = reference.logprobs(i["logits"], i["targets"])
        return {"logprobs": stats.logprobs, "entropy": stats.entropy}

    shapes = {
        "gpu": ({"N": 8192, "V": 151936}, {"N": 8192, "V": 128256}, {"N": 64, "V": 151936}),
        "cpu": ({"N": 2048, "V": 32768},),
        "quick": ({"N": 32, "V": 3000},),
    }
    for shape, dtype in with_small(shapes[size], size):
        shape = {"N": shape["N"], "V": shape["V"]}
        once = shape["N"] * shape["V"] * dtype.itemsize
        yield Case(
            "logprobs",
            shape,
            dtype,
            inputs,
            specification,
            ("logits",),
            peers.LOGPROBS,
            {
                FORWARD: copied(once, "N V x itemsize (one read)"),
                BOTH: copied(3 * once, "3 N V x itemsize (two reads, one write)"),
            },
            {**shape, "N": min(shape["N"], 64)},
        )


# --- advantages and groups ----------------------------------------------------------------------


def linear_experience(size: str) -> Iterator[Case]:
    """Packed sequences of uneven lengths; forward only, as a trainer asks before any update."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        given = head_inputs(shape, dtype, device)
        return peers_experience.packed(given, shape["S"], generator(device))

    shape = {**HEADS[size][0], "S": 8 if size == "quick" else 32}
    own, work = peers_experience, head_work(shape, {FORWARD: (1, 0, 0)})
    exact, contenders = own.specified_linear_experience, own.LINEAR_EXPERIENCE
    small = {**shape, "N": min(shape["N"], 256)}
    yield Case(
        "linear_experience", shape, dtype_of(size), inputs, exact, (), contenders, work, small
    )


def experience(size: str) -> Iterator[Case]:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        s, t, g, rng = shape["S"], shape["T"], shape["G"], generator(device)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, generator=rng, dtype=dtype)

        lengths = torch.randint(t // 2, t + 1, (s, 1), device=device, generator=rng)
        logprobs = noise(s, t).abs().neg()
        return {
            "logprobs": logprobs,
            "ref_logprobs": logprobs + 0.1 * noise(s, t),
            "values": noise(s, t),
            "scores": noise(s),
            "mask": torch.arange(t, device=device) < lengths,
            "group_ids": torch.randint(g, (s,), device=device, generator=rng),
            "num_groups": g,
        }

    shapes = {
        "gpu": ({"S": 512, "T": 2048, "G": 4}, {"S": 1024, "T": 16384, "G": 64}),
        "cpu": ({"S": 256, "T": 1024, "G": 4},),
        "quick": ({"S": 16, "T": 48, "G": 2},),
    }
    for shape in shapes[size]:
        # fp32: log-probs, reference, values in; rewards, kl, advantages, returns out; a bool mask
        amount = 29 * shape["S"] * shape["T"]
        yield Case(
            "experience",
            shape,
            torch.float32,
            inputs,
            peers.torch_experience,
            (),
            peers.EXPERIENCE,
            {FORWARD: copied(amount, "29 S T (3 fp32 in, 4 out, mask)")},
            {**shape, "S": min(shape["S"], 64), "T": min(shape["T"], 512)},
        )


def grouped_values(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    n, g, rng = shape["n"], shape["G"], generator(device)
    return {
        "values": torch.randn(n, device=device, generator=rng, dtype=dtype),
        "group_ids": torch.randint(g, (n,), device=device, generator=rng),
        "num_groups": g,
    }


def groups(size: str) -> Iterator[Case]:
    def specification(i: Inputs) -> Outputs:
        return reference.group_stats(i["values"], i["group_ids"], i["num_groups"])._asdict()

    shapes = {
        "gpu": ({"n": 1 << 20, "G": 8}, {"n": 1 << 24, "G": 4096}),
        "cpu": ({"n": 1 << 20, "G": 8},),
        "quick": ({"n": 3000, "G": 3},),
    }
    for shape in shapes[size]:
        amount = 12 * shape["n"]
        yield Case(
            "groups",
            shape,
            torch.float32,
            grouped_values,
            specification,
            (),
            peers.GROUPS,
            {FORWARD: copied(amount, "12 n (fp32 value, int64 id)")},
            {**shape, "n": min(shape["n"], 1 << 16)},
        )


def group_advantages(size: str) -> Iterator[Case]:
    def specification(i: Inputs) -> Outputs:
        a = reference.group_advantages(i["values"], i["group_ids"], i["num_groups"])
        return {"advantages": a}

    shapes = {
        "gpu": ({"n": 4096, "G": 512}, {"n": 1 << 20, "G": 1 << 16}),
        "cpu": ({"n": 4096, "G": 512},),
        "quick": ({"n": 200, "G": 30},),
    }
    for shape in shapes[size]:
        yield Case(
            "group_advantages",
            shape,
            torch.float32,
            grouped_values,
            specification,
            (),
            peers.GROUP_ADVANTAGES,
            {FORWARD: copied(16 * shape["n"], "16 n (fp32 in, int64 id, fp32 out)")},
            {**shape, "n": min(shape["n"], 1 << 16)},
        )


# --- the exact partition ------------------------------------------------------------------------


def partition(size: str) -> Iterator[Case]:
    """bench_partition.py has more shapes and data, and the bars."""

    def specification(i: Inputs) -> Outputs:
        ids = reference.partition(i["values"], i["num_groups"]).group_ids
        return peers.between_variance(i["values"], ids)

    def sort(i: Inputs) -> Callable[[], Any]:
        return lambda: i["values"].sort()

    shapes = {
        "gpu": ({"n": 8192, "G": 8}, {"n": 131072, "G": 8}),
        "cpu": ({"n": 8192, "G": 8},),
        "quick": ({"n": 300, "G": 3},),
    }
    for shape in shapes[size]:
        yield Case(
            "partition",
            shape,
            torch.float32,
            grouped_values,
            specification,
            (),
            peers.PARTITION,
            {FORWARD: Work(shape["n"], "value", "n", "a sort", sort)},
            {**shape, "n": min(shape["n"], 1000)},
        )


OPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "linear_logprobs": linear_logprobs,
    "linear_logprobs_support": linear_logprobs_support,
    "logprobs": logprobs,
    "linear_policy_loss": linear_policy_loss,
    "linear_gather_logprobs": linear_gather_logprobs,
    "linear_divergence": linear_divergence,
    "linear_experience": linear_experience,
    "experience": experience,
    "groups": groups,
    "group_advantages": group_advantages,
    "partition": partition,
}

# The tests that have to be green before a speed is reported.
TESTS = {
    "linear_logprobs": "tests/gikernels/vocabulary/test_linear_logprobs.py",
    "linear_logprobs_support": "tests/gikernels/vocabulary/test_support.py",
    "logprobs": "tests/gikernels/vocabulary/test_logprobs.py",
    "linear_policy_loss": "tests/gikernels/vocabulary/test_policy_loss.py",
    "linear_gather_logprobs": "tests/gikernels/vocabulary/test_gather_logprobs.py",
    "linear_divergence": "tests/gikernels/vocabulary/test_divergence.py",
    "linear_experience": "tests/gikernels/sequence/test_experience.py",
    "experience": "tests/gikernels/sequence/test_experience.py",
    "groups": "tests/gikernels/groups/test_stats.py",
    "group_advantages": "tests/gikernels/groups/test_stats.py",
    "partition": "tests/gikernels/groups/test_partition.py",
}


def find(op: str, size: str, index: int) -> Case:
    return list(OPS[op](size))[index]
