"""The exact partition of values into groups of largest between-group variance.

csrc/ has the algorithm, for CPUs ("cpp") and GPUs ("cuda"); where nothing could be compiled the
same steps run in PyTorch ("reference"), on any device. A GPU whose machine has no nvcc borrows the
CPU: the values are few, and PyTorch would wait for the GPU at every step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gikernels import reference
from gikernels.backends import checks, dispatch
from gikernels.reference import Partition, Points

# Status words of csrc/partition.h, and one of csrc/partition.cpp.
BAD_VALUES, BAD_WEIGHTS, INFEASIBLE, NO_MEMORY = 1, 2, 4, 8

OFFERS = ("cuda", "cpp", "reference")


# --- csrc/ ----------------------------------------------------------------------------------------


def _solve_native(
    library: str,
    values: Tensor,  # (B, n) fp32 or fp64
    weights: Tensor | None,  # (B, n) fp64
    num_groups: int,
    min_size: int,
) -> tuple[Partition, Tensor]:
    """The partition of every row, in float64, and a status word of each, (B) int32."""
    from gikernels.backends import build  # here: it needs fcntl, which Windows has not

    rows, n = values.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=values.device)

    out = Partition(
        empty(rows, n, dtype=torch.int32),
        empty(rows, num_groups - 1),
        empty(rows, num_groups),
        empty(rows),
    )
    status = empty(rows, dtype=torch.int32)
    inputs = [values.data_ptr(), None if weights is None else weights.data_ptr(), rows, n]
    results = [t.data_ptr() for t in (*out, status)]
    loaded = build.library(library)
    suffix = "f64" if values.dtype == torch.float64 else "f32"
    if library == "cpp":
        solve = getattr(loaded, f"gi_partition_cpu_{suffix}")
        error = solve(*inputs, num_groups, min_size, torch.get_num_threads(), *results)
        if error:
            raise RuntimeError("gikernels.partition could not start its threads")
        return out, status
    with torch.cuda.device(values.device):
        ask = getattr(loaded, f"gi_partition_cuda_workspace_{suffix}")
        size = ask(rows, n, num_groups, int(weights is not None))
        _raise_on_cuda_error(loaded, -size)
        workspace = empty(size, dtype=torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        solve = getattr(loaded, f"gi_partition_cuda_{suffix}")
        error = solve(*inputs, num_groups, min_size, *results, workspace.data_ptr(), stream)
        _raise_on_cuda_error(loaded, error)
    return out, status


def _raise_on_cuda_error(loaded, error: int) -> None:
    if error > 0:
        raise RuntimeError(f"gikernels.partition: {loaded.gi_cuda_error(error).decode()}")


# --- PyTorch --------------------------------------------------------------------------------------


def _solve_in_torch(
    values: Tensor,  # (n)
    weights: Tensor | None,  # (n) fp64
    num_groups: int,
    min_size: int,
) -> Partition | None:
    """One row, as csrc/partition.h, which has the proofs. None where there is no such partition."""
    points = reference.distinct_points(values, weights)
    sums = (points.members, points.mass, points.mass * points.centred)
    # (u + 1) each; by the CPU, for the bits of a GPU's cumsum may differ from run to run.
    members, mass, moment = (F.pad(t.cpu().cumsum(0), (1, 0)).to(t.device) for t in sums)
    # The latest cut that leaves min_size members before point j, and the earliest after; may be -1
    # and u + 1, where there is none.
    latest = torch.searchsorted(members, members - min_size, right=True) - 1
    earliest = torch.searchsorted(members, members + min_size)

    u = len(points.values)
    low, high = [0], [u]
    for _ in range(num_groups):
        if low[-1] > u:
            return None
        low.append(int(earliest[low[-1]]))
        high.append(int(latest[high[-1]]))
    if low[-1] > u:
        return None
    low, high = [*low[:-1], u], [0, *high[-2::-1]]
    if (points.mass > 0).all():
        low, high = _narrow(points, mass, moment, latest, earliest, low, high)

    best, cuts = mass.new_zeros(1), []
    for k in range(1, num_groups + 1):
        windows = (low[k - 1], low[k], high[k])
        best, cut = _layer(best, mass, moment, latest, *windows)
        cuts.append(cut)
    starts = [u]
    for k in range(num_groups, 0, -1):
        starts.append(int(cuts[k - 1][starts[-1] - low[k]]))
    inner = torch.tensor(starts[-2:0:-1], dtype=torch.long, device=values.device)
    return reference.partition_at(values, points, inner)


def _narrow(
    points: Points,
    mass: Tensor,  # (u + 1) prefix sums of weights
    moment: Tensor,  # (u + 1) and of weight * value
    latest: Tensor,  # (u + 1)
    earliest: Tensor,  # (u + 1)
    low: list[int],  # (K + 1) the window of each cut by member counts
    high: list[int],
) -> tuple[list[int], list[int]]:
    """Windows outside of which no best cut lies: Lloyd's step moves both ends inwards."""

    def midpoints(cuts: Tensor, sign: int) -> Tensor:
        weight = mass[cuts].diff()
        means, slack = moment[cuts].diff() / weight, 1e-13 * mass[-1] / weight
        return (means[1:] + means[:-1]) / 2 + sign * (slack[1:] + slack[:-1])

    lo = torch.tensor(low, device=mass.device)
    hi = torch.tensor(high, device=mass.device)
    width = int((hi - lo).sum())
    while width:
        up = torch.searchsorted(points.centred, midpoints(lo, -1))
        down = torch.searchsorted(points.centred, midpoints(hi, 1))
        up = lo[1:-1].maximum(up.minimum(latest[lo[2:]]))
        down = hi[1:-1].minimum(down.maximum(earliest[hi[:-2]]))
        lo[1:-1], hi[1:-1] = up, down.maximum(up)
        before, width = width, int((hi - lo).sum())
        if before - width <= 8 * len(low):
            break
    return lo.tolist(), hi.tolist()


def _layer(
    previous: Tensor,  # the best of the first i points in k - 1 groups, for i = previous_first...
    mass: Tensor,
    moment: Tensor,
    latest: Tensor,
    previous_first: int,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor]:
    """The best of the first j points in k groups for j = first..last, and the cut that gives it.

    The lowest best cut never falls when j rises. With stride s the places s - 1, 3 s - 1, ... are
    solved at once, each between the cuts of its neighbours at a distance of s.
    """
    places, previous_last = last - first + 1, previous_first + len(previous) - 1
    best, cut = mass.new_empty(places), torch.empty_like(latest[:places])
    stride = 1 << (places.bit_length() - 1)
    while stride:
        r = torch.arange(stride - 1, places, 2 * stride, device=mass.device)
        j = first + r
        after = (r + stride).clamp(max=places - 1)
        lowest = torch.where(r >= stride, cut[r - stride], previous_first)
        highest = torch.where(r + stride < places, cut[after], previous_last)
        count = highest.minimum(latest[j]) - lowest + 1
        node = torch.repeat_interleave(count)  # of each candidate: 0, 0, 0, 1, 1, 2, ...
        i = torch.arange(len(node), device=mass.device) - (count.cumsum(0) - count - lowest)[node]
        m, s = mass[j[node]] - mass[i], moment[j[node]] - moment[i]
        gain = torch.where(m > 0, s.square() / torch.where(m > 0, m, 1), 0)
        objective = previous[i - previous_first] + gain
        top = torch.full_like(mass[j], -1).scatter_reduce(0, node, objective, "amax")
        i = i.masked_fill(objective < top[node], last)  # of equals the lowest stays
        best[r], cut[r] = top, torch.full_like(j, last).scatter_reduce(0, node, i, "amin")
        stride //= 2
    return best, cut


def _solve_rows_in_torch(
    values: Tensor, weights: Tensor | None, num_groups: int, min_size: int
) -> tuple[Partition, Tensor]:
    status = torch.where(values.isfinite().all(1), 0, BAD_VALUES)
    if weights is not None:
        status |= torch.where((weights.isfinite() & (weights >= 0)).all(1), 0, BAD_WEIGHTS)
    scaled, scale = _power_of_two(values.double())
    rows: list[Partition] = []
    for b, code in enumerate(status.tolist()):
        row_weights = None if weights is None else weights[b]
        row = None if code else _solve_in_torch(scaled[b], row_weights, num_groups, min_size)
        if row is None:
            status[b] = code or INFEASIBLE
            return Partition(*[values.new_empty(0)] * 4), status
        rows.append(row)
    found = Partition(*(torch.stack(field) for field in zip(*rows)))
    return Partition(
        found.group_ids,
        found.thresholds / scale,
        found.centers / scale,
        found.between_variance / scale[:, 0] / scale[:, 0],
    ), status


# --- the operation --------------------------------------------------------------------------------


def _raise_for(status: list[int], values: Tensor, num_groups: int, min_size: int) -> None:
    """For the first row that could not be solved."""
    row, code = next(((b, code) for b, code in enumerate(status) if code), (0, 0))
    where = f"row {row} " if values.dim() == 2 else ""
    if code & NO_MEMORY:
        raise MemoryError(f"gikernels.partition of {values.shape[-1]} values, {num_groups} groups")
    if code & BAD_VALUES:
        raise ValueError(f"values: {where}holds NaN or infinity, want finite values")
    if code & BAD_WEIGHTS:
        raise ValueError(f"weights: {where}holds one that is not finite or < 0, want finite >= 0")
    if code & INFEASIBLE:
        x = values[row] if values.dim() == 2 else values
        raise ValueError(
            f"values: {where}has {len(x)} values, {len(x.unique())} distinct: too few for "
            f"num_groups={num_groups} groups of at least min_size={min_size} members, where equal "
            "values stay together"
        )


def _power_of_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x times powers of two, so that squares and sums of huge ones stay finite: no digit
    changes. And the factors, (B, 1)."""
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent
    scale = torch.exp2(-exponent.double().clamp(-1000, 1000))
    return x * scale, scale


def _blank(values: Tensor, num_groups: int) -> Partition:
    batch, dtype = values.shape[:-1], reference.stat_dtype(values)
    return Partition(
        values.new_empty(values.shape, dtype=torch.int32),
        values.new_empty((*batch, num_groups - 1), dtype=dtype),
        values.new_empty((*batch, num_groups), dtype=dtype),
        values.new_empty(batch, dtype=dtype),
    )


def _choose(backend: str, values: Tensor) -> str:
    chosen = dispatch.choose(backend, values, OFFERS)
    borrow = backend == "auto" and chosen == "reference" and values.is_cuda
    return "cpp" if borrow and dispatch.backend_status("cpp") else chosen


@torch.library.custom_op("gikernels::partition", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS)
def _partition(
    values: Tensor, weights: Tensor | None, num_groups: int, min_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = _choose(backend, values)
    blank = _blank(values, num_groups)
    if values.numel() == 0:
        return tuple(blank)  # type: ignore[return-value]
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    rows = values.to(dtype).reshape(-1, values.shape[-1]).contiguous()
    if weights is not None:
        weights = _power_of_two(weights.double().reshape(rows.shape).contiguous())[0]
    if backend == "reference":
        found, status = _solve_rows_in_torch(rows, weights, num_groups, min_size)
    elif backend == "cpp":
        rows, weights = rows.cpu(), None if weights is None else weights.cpu()
        found, status = _solve_native(backend, rows, weights, num_groups, min_size)
        found = Partition(*(field.to(values.device) for field in found))
    else:
        found, status = _solve_native(backend, rows, weights, num_groups, min_size)
    if not dispatch.capturing(values):
        _raise_for(status.tolist(), values, num_groups, min_size)
    return tuple(  # type: ignore[return-value]
        field.to(like.dtype).reshape(like.shape) for field, like in zip(found, blank)
    )


@_partition.register_fake
def _(values, weights, num_groups, min_size, backend):
    return tuple(_blank(values, num_groups))


def partition(
    values: Tensor,  # (n) or (B, n) float, finite
    num_groups: int = 2,
    *,
    weights: Tensor | None = None,  # like values, finite and >= 0
    min_size: int = 1,
    backend: str = "auto",
) -> Partition:
    """Of all assignments to K groups the one with the largest between-group variance. Equivalent:

        x, order = values.sort()
        cuts = the K - 1 places in x, none between equal values, that maximise
               sum over groups of weight_g / weight * (mean_g - mean) ** 2

    Group 0 has the lowest values. Equal values are never split, and every group has at least
    `min_size` members, whatever their weights. Of cuts that are equally good the lowest are taken.
    Rows of a batch are independent. float64 values keep float64 results; all others give float32.

    Raises ValueError for NaN, infinity, or too few distinct values. On a GPU that needs one small
    copy of status words to the host; while a CUDA graph is captured it is left out, and a row
    that cannot be solved gets group_ids -1 and NaN. The results carry no gradient: they are
    constant but for jumps in `values`, and centres of fixed groups are easily taken again.
    """
    checks.floats("values", values)
    if values.dim() not in (1, 2):
        raise checks.wrong("values", values, "shape (n) or (B, n)")
    checks.whole("num_groups", num_groups, at_least=1)
    checks.whole("min_size", min_size, at_least=1)
    n = values.shape[-1]
    if n == 0 and values.shape != (0, 0):
        raise checks.wrong("values", values, "at least one value to a row")
    if n >= 2**31 - 32:
        raise checks.wrong("values", values, "fewer than 2**31 - 32 values to a row")
    if num_groups * min_size > n and values.shape[0]:
        want = f"at least num_groups * min_size = {num_groups} * {min_size} values to a row"
        raise checks.wrong("values", values, want)
    if weights is not None:
        checks.tensor("weights", weights, checks.FLOATS + checks.INTS, "float or integer")
        checks.shape("weights", weights, values.shape, "that of values")
        checks.same_device(values=values, weights=weights)
        weights = weights.detach()
    return Partition(
        *torch.ops.gikernels.partition(values.detach(), weights, num_groups, min_size, backend)
    )
