"""Whether the operations give right results on this machine, and a table that says so.

    python -m gikernels.selftest [--device cuda|cpu]

Each operation, forward and backward, with each backend that it has here, against the specification
in float64 on the same inputs, at 1, 129 and 897 rows. Errors are relative to the largest number of
a result; what rounds to 16 bits is allowed that. Exit code 1 if one is off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gikernels
from gikernels import reference
from gikernels.backends.dispatch import backend_status

ROWS = (1, 129, 897)
D, V = 64, 1000
# Results are fp32; gradients have the dtype of what they belong to, and so has dZ on the way.
ALLOWED = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-4, 2e-2)}  # forward, backward


class Case(NamedTuple):
    name: str
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    # Inputs of so many rows by name; those of `leaves` get a gradient.
    inputs: Callable[[int], dict[str, Any]]
    leaves: tuple[str, ...]
    # The operation and its specification, which take the inputs by name.
    ours: Callable[..., Any]
    truth: Callable[..., Any]


FLOATS = (torch.float32, torch.bfloat16)


def _head(n: int) -> dict[str, Any]:
    targets = torch.randint(V, (n,))
    targets[1::7] = -100
    return {
        "hidden": torch.randn(n, D),
        "weight": torch.randn(V, D) / 4,
        "targets": targets,
        "temperature": torch.rand(n) + 0.5,
        "bias": torch.randn(V),
        "ref": (torch.randn(n, D), torch.randn(V, D) / 4),
        "softcap": 20.0,
    }


def _with_support(given: dict[str, Any]) -> dict[str, Any]:
    """Every third row kept a few tokens, the target among them, every third nearly all."""
    n, shift = len(given["targets"]), given["targets"].clamp(min=0)
    lengths = torch.tensor([(0, 7, V - 3)[i % 3] for i in range(n)])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    place = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths)
    ids = (shift.repeat_interleave(lengths) + place) % V
    return {**given, "support": reference.Support(ends, ids)}


def _logits(n: int) -> dict[str, Any]:
    given = _head(n)
    kept = {key: given[key] for key in ("targets", "temperature", "softcap")}
    return {"logits": 3 * torch.randn(n, V), "ref_logits": 3 * torch.randn(n, V), **kept}


def _policy(n: int) -> dict[str, Any]:
    given = _head(n)
    mask = given["targets"] >= 0
    given["targets"] = given["targets"].clamp(min=0)
    del given["ref"]
    # As in a real step: old and reference log-probabilities near the policy's own.
    head: dict[str, Any] = {key: x.double() for key, x in given.items() if isinstance(x, Tensor)}
    head |= {"targets": given["targets"], "softcap": given["softcap"]}
    now = reference.linear_logprobs(**head).logprobs.float()
    return {
        **given,
        "old_logprobs": now + 0.05 * torch.randn(n),
        "ref_logprobs": now + 0.05 * torch.randn(n),
        "advantages": torch.randn(n),
        "mask": mask,
        "denom": float(n),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }


def _gather(n: int) -> dict[str, Any]:
    given = _head(n)
    ids = torch.randint(-1, V, (n, 8))
    kept = ("hidden", "weight", "temperature", "bias", "softcap")
    return {"ids": ids, **{key: given[key] for key in kept}}


def _divergence(n: int) -> dict[str, Any]:
    given = _head(n)
    mask = given.pop("targets") >= 0
    return {**given, "mask": mask, "denom": float(n), "kind": "jsd", "mix": 0.3}


def _sequences(n: int) -> dict[str, Any]:
    steps = 37
    return {
        **{key: torch.randn(n, steps) for key in ("logprobs", "ref_logprobs", "values")},
        "scores": torch.randn(n),
        "mask": torch.rand(n, steps) < 0.8,
        "kl_coef": torch.rand(n),
        "gamma": 0.99,
    }


def _by_group(n: int) -> dict[str, Any]:
    groups = {"group_ids": torch.arange(n) % 3, "num_groups": 3}
    return {**_sequences(n), "norm": "group", "estimator": "k3", **groups}


def _gae(n: int) -> dict[str, Any]:
    given = _sequences(n)
    rewards = {"rewards": given["logprobs"], "last_values": torch.randn(n)}
    return {**rewards, "values": given["values"], "mask": given["mask"], "gamma": 0.99}


def _moments(n: int) -> dict[str, Any]:
    given = _sequences(n)
    moments = torch.tensor([[9.0, 0.5, 7.0], [5.0, -0.5, 3.0], [7.0, 0.0, 2.0]])
    ids = {"group_ids": torch.arange(n) % 3, "moments": moments}
    return {"advantages": given["values"], "mask": given["mask"], **ids}


def _packed(n: int) -> dict[str, Any]:
    given = _head(n)
    sequences = max(1, n // 20)
    ends = torch.arange(sequences + 1) * n // sequences
    tokens = {"ref_logprobs": torch.randn(n) - 7, "values": torch.randn(n)}
    rest = {"scores": torch.randn(sequences), "kl_coef": 0.1, "norm": "batch"}
    return {**given, **tokens, **rest, "cu_seqlens": ends, "estimator": "exact"}


def _groups(n: int) -> dict[str, Any]:
    ids = {"group_ids": torch.arange(n) % 7, "num_groups": 7}
    return {"values": torch.randn(n) + 100, "weights": torch.rand(n), **ids}


def _partition(n: int) -> dict[str, Any]:
    return {"values": torch.randn(n), "num_groups": min(n, 3), "weights": torch.rand(n) + 0.1}


ROUNDED = ("hidden", "weight", "bias", "ref", "logits", "ref_logits")
_HEAD = ("hidden", "weight", "bias")
_TRITON = ("triton", "reference")
CASES = (
    Case("linear_logprobs", _TRITON, FLOATS, _head, _HEAD,
         gikernels.linear_logprobs, reference.linear_logprobs),
    Case("logprobs", _TRITON, FLOATS, _logits, ("logits",),
         gikernels.logprobs, reference.logprobs),
    Case("linear_policy_loss", _TRITON, FLOATS, _policy, _HEAD,
         gikernels.linear_policy_loss, reference.linear_policy_loss),
    Case("linear_logprobs_support", _TRITON, FLOATS, lambda n: _with_support(_head(n)), _HEAD,
         gikernels.linear_logprobs, reference.linear_logprobs),
    Case("logprobs_support", _TRITON, FLOATS, lambda n: _with_support(_logits(n)), ("logits",),
         gikernels.logprobs, reference.logprobs),
    Case("policy_loss_support", _TRITON, FLOATS, lambda n: _with_support(_policy(n)), _HEAD,
         gikernels.linear_policy_loss, reference.linear_policy_loss),
    Case("linear_gather_logprobs", _TRITON, FLOATS, _gather, _HEAD,
         gikernels.linear_gather_logprobs, reference.linear_gather_logprobs),
    Case("linear_divergence", _TRITON, FLOATS, _divergence, _HEAD,
         gikernels.linear_divergence, reference.linear_divergence),
    Case("linear_experience", _TRITON, FLOATS, _packed, (),
         gikernels.linear_experience, reference.linear_experience),
    Case("experience_support", _TRITON, FLOATS, lambda n: _with_support(_packed(n)), (),
         gikernels.linear_experience, reference.linear_experience),
    Case("experience", ("triton", "cpp", "reference"), FLOATS[:1], _by_group, (),
         gikernels.experience, reference.experience),
    Case("gae", _TRITON, FLOATS[:1], _gae, (), gikernels.gae, reference.gae),
    Case("normalize_advantages", _TRITON, FLOATS[:1], _moments, (),
         gikernels.normalize_advantages, reference.normalize_advantages),
    Case("group_stats", ("triton", "cpp", "reference"), FLOATS[:1], _groups, (),
         gikernels.group_stats, reference.group_stats),
    Case("partition", ("cuda", "cpp", "reference"), FLOATS[:1], _partition, (),
         gikernels.partition, reference.partition),
)  # fmt: skip


class Result(NamedTuple):
    op: str
    backend: str
    dtype: str
    rows: int
    forward: float  # the largest relative error
    backward: float | None
    seconds: float
    problem: str  # empty where all is well


def _moved(x: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    if isinstance(x, reference.Support):
        return reference.Support._make(_moved(y, device) for y in x)
    if isinstance(x, tuple):
        return tuple(_moved(y, device, dtype) for y in x)
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype if x.is_floating_point() else None)


def _flat(out: Any) -> list[Tensor]:
    """The tensors of a result, NamedTuples and dictionaries among them, in order."""
    if isinstance(out, dict):
        out = tuple(out.values())
    if isinstance(out, tuple):
        return [x for part in out for x in _flat(part)]
    return [out] if isinstance(out, Tensor) else []


def _run(op: Callable, given: dict[str, Any], leaves: tuple[str, ...]) -> tuple[list, list]:
    """Results, and the gradients of their weighted sum, in float64."""
    given = {k: x.requires_grad_() if k in leaves else x for k, x in given.items()}
    out = _flat(op(**given))
    if not leaves:
        return [x.detach().double() for x in out], []
    # Weights that are the same for every backend and dtype.
    loss = torch.zeros((), dtype=torch.float64, device=out[0].device)
    for x in out:
        if x.requires_grad:
            weights = torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape)
            loss = loss + (x.double() * weights).sum()
    gradients = torch.autograd.grad(loss, [given[name] for name in leaves])
    return [x.detach().double() for x in out], [g.double() for g in gradients]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """Infinite where something is not finite, or of another shape."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or not a.isfinite().all():
            return float("inf")
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-2)))
    return worst


def check(case: Case, backend: str, dtype: torch.dtype, rows: int, device: str) -> Result:
    torch.manual_seed(rows)
    given = case.inputs(rows)
    # Only what operations take in 16 bits is rounded to them, then for the specification too.
    given |= {k: _moved(x, "cpu", dtype) for k, x in given.items() if k in ROUNDED}
    here = {k: _moved(x, device) for k, x in given.items()}
    exact = {k: _moved(x, device, torch.float64) for k, x in given.items()}
    start = time.perf_counter()
    forward, backward, problem = float("inf"), None, ""
    try:
        got, gradients = _run(
            lambda **given: case.ours(**given, backend=backend), here, case.leaves
        )
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        want, true_gradients = _run(case.truth, exact, case.leaves)
        allowed = ALLOWED[dtype]
        forward = _error(got, want)
        backward = _error(gradients, true_gradients) if case.leaves else None
        if forward > allowed[0] or (backward or 0) > allowed[1]:
            problem = f"off: {allowed[0]:.0e} and {allowed[1]:.0e} are allowed"
    except Exception as error:
        seconds = time.perf_counter() - start
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    name = str(dtype).removeprefix("torch.")
    return Result(case.name, backend, name, rows, forward, backward, seconds, problem)


def results(device: str) -> Iterator[Result]:
    lives_on = {"triton": "cuda", "cuda": "cuda", "cpp": "cpu", "reference": device}
    for case in CASES:
        for backend in case.backends:
            if lives_on[backend] != device or not backend_status(backend):
                continue
            for dtype in case.dtypes:
                for rows in ROWS:
                    yield check(case, backend, dtype, rows, device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gikernels.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    device = parser.parse_args(arguments).device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("device: got cuda, but torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    for name, status in gikernels.backends().items():
        print(f"{name:10} {'yes' if status else 'no '}  {status.reason.splitlines()[0]}")
    line = "{:23} {:9} {:8} {:>4}  {:>8} {:>8} {:>8}  {}"
    print("\n" + line.format("op", "backend", "dtype", "rows", "forward", "backward", "s", ""))
    off = 0
    for r in results(device):
        off += bool(r.problem)
        backward = "" if r.backward is None else f"{r.backward:.1e}"
        cells = (f"{r.forward:.1e}", backward, f"{r.seconds:.2f}", r.problem or "ok")
        print(line.format(*r[:4], *cells), flush=True)
    print(f"\n{off} off" if off else "\nall right")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
