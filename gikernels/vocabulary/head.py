"""What the operations on an output head share: their arguments, and the arithmetic of a chunk.

A chunk of logits z is (n, c): some rows, some columns of the vocabulary. It is worked on in place
and, on a CPU, small enough to stay in the cache; no (rows x vocabulary) tensor ever exists. A row's
statistics are relative to its maximum, `peak`, as in gikernels.vocabulary.tiles (u = z - peak):

    total    = sum exp(u)                 log-sum-exp = peak + log(total)
    weighted = sum exp(u) u               entropy     = log(total) - weighted / total
    cross    = sum exp(u) (u - ref_u)     KL          = cross / total - log(total) + log(ref_total)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.reference import stat_dtype

# --- arguments ----------------------------------------------------------------------------------


def autocast(x: Tensor) -> Tensor:
    """As F.linear does under autocast: float64 stays. The logits are not rounded, though."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """16 bits beside a weight of 32, a head kept in fp32, as 32: few numbers beside the weight."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half and weight.dtype == torch.float32 else x


def full_precision(op: Callable) -> Callable:
    """Autocast has done its work on the arguments; inside, products are what they look like."""

    @functools.wraps(op)
    def without_autocast(*args):
        # Not simply the first: the backward has no gradient of an output that nobody used.
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return op(*args)

    return without_autocast


def head_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, part: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks (..., D), (V, D), (...) and (V), and casts the floats as autocast would. A part of a
    vocabulary may be empty."""
    checks.floats("hidden", hidden)
    checks.not_sharded("weight", checks.floats("weight", weight))
    if hidden.dim() == 0:
        raise checks.wrong("hidden", hidden, "shape (..., D)")
    checks.dims("weight", weight, 2, "(V, D)")
    checks.shape(
        "weight", weight, (weight.shape[0], hidden.shape[-1]), "(V, D) with the D of hidden"
    )
    if weight.shape[0] == 0 and not part:
        raise checks.wrong("weight", weight, "a vocabulary of at least one token")
    checks.shape("targets", checks.ints("targets", targets), hidden.shape[:-1], "one for each row")
    checks.same_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    checks.backward_only(hidden=hidden, weight=weight, bias=bias)
    checks.rows_of_one_rank(targets=targets)
    weight = autocast(weight)
    hidden = widened(autocast(hidden), weight)
    if weight.dtype != hidden.dtype:
        raise checks.wrong("weight", weight, f"the dtype of hidden, {hidden.dtype}, or autocast")
    if bias is not None:
        checks.shape("bias", checks.floats("bias", bias), (weight.shape[0],), "one for each token")
        checks.not_sharded("bias", bias)
        bias = widened(autocast(bias), weight)
        if bias.dtype != hidden.dtype:
            raise checks.wrong("bias", bias, f"the dtype of hidden, {hidden.dtype}, or autocast")
    return hidden, weight, bias


def reference_arguments(
    ref: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if ref is None:
        return None, None
    if not isinstance(ref, (tuple, list)) or len(ref) != 2:
        raise checks.wrong("ref", ref, "a pair (ref_hidden, ref_weight) or None")
    x, w = (checks.floats(f"ref[{i}]", t).detach() for i, t in enumerate(ref))
    checks.not_sharded("ref[1]", w)
    checks.dims("ref[1]", w, 2, "(V, D')")
    checks.shape(
        "ref[0]", x, (*hidden.shape[:-1], w.shape[1]), "hidden's leading dimensions and D'"
    )
    checks.shape("ref[1]", w, (weight.shape[0], w.shape[1]), "the vocabulary of weight and D'")
    checks.same_device(hidden=hidden, **{"ref[0]": x, "ref[1]": w})
    w = autocast(w)
    x = widened(autocast(x), w)
    if x.dtype != w.dtype:
        raise checks.wrong("ref[1]", w, f"the dtype of ref[0], {x.dtype}")
    return x, w


def temperature_arguments(
    temperature: float | Tensor, targets: Tensor
) -> tuple[float, Tensor | None]:
    """A number, or 1 and a tensor of the shape of targets."""
    if not isinstance(temperature, Tensor):
        return float(checks.number("temperature", temperature, above=0)), None
    checks.floats("temperature", temperature)
    if temperature.dim():
        checks.shape("temperature", temperature, targets.shape, "that of targets, or a number")
    checks.same_device(targets=targets, temperature=temperature)
    return 1.0, temperature.detach().expand(targets.shape)


def row_temperature(
    hidden: Tensor, weight: Tensor, temperature: float, temperatures: Tensor | None
) -> Tensor:
    """(N) in the precision of the statistics; a single number takes no memory."""
    dtype = stat_dtype(hidden, weight)
    if temperatures is not None:
        return temperatures.to(dtype)
    return hidden.new_full((), temperature, dtype=dtype).expand(len(hidden))


def transform_arguments(softcap: float | None, logit_scale: float) -> tuple[float | None, float]:
    if softcap is not None:
        softcap = float(checks.number("softcap", softcap, above=0))
    return softcap, float(checks.number("logit_scale", logit_scale))


def check_values(targets: Tensor, temperatures: Tensor | None, v: int) -> None:
    """Of the rows that count. Only on a CPU: on a GPU it would mean to wait for the values."""
    bad = (targets < 0) | (targets >= v)
    if bad.any():
        raise checks.wrong("targets", targets[bad][0].item(), f"0 <= target < {v}")
    if temperatures is not None and not (temperatures > 0).all():  # NaN is neither
        raise checks.wrong("temperature", temperatures.min().item(), "numbers > 0")


def choose_backend(backend: str, hidden: Tensor) -> str:
    """Triton has fp32 accumulators, so "auto" takes PyTorch for float64; and for fp32 products that
    have to be exact, where cuBLAS has some 50 TFLOP/s and a kernel a third of it."""
    if hidden.dtype == torch.float64:
        if backend == "triton":
            raise checks.wrong("hidden", hidden, "at most 32 bits for backend 'triton'")
        return dispatch.choose(backend, hidden, ("reference",))
    exact = hidden.dtype == torch.float32 and dispatch.exact_fp32()
    offers = ("reference", "triton") if exact else ("triton", "reference")
    return dispatch.choose(backend, hidden, offers)


# --- rows that count ----------------------------------------------------------------------------


class Kept:
    """Rows taken out of all rows, so that the others cost nothing. On a GPU this waits for their
    number. While a CUDA graph is captured nobody may: all rows stay, and the others are blank."""

    def __init__(self, keep: Tensor) -> None:  # (N) bool
        self.keep = keep
        self.blank = dispatch.capturing(keep)
        if self.blank:
            self.rows = torch.arange(len(keep), device=keep.device)
        else:
            self.rows = keep.nonzero().squeeze(1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def all(self) -> bool:
        return len(self.rows) == len(self.keep)

    def pick(self, x: Tensor, fill: float = 0) -> Tensor:  # (N, ...) -> (n, ...)
        if self.blank:
            return x.where(self.keep.view(-1, *(1,) * (x.dim() - 1)), fill)
        return x if self.all else x[self.rows]

    def clear_(self, x: Tensor) -> Tensor:
        """Zeros, in place, where rows (N, ...) stayed that do not count."""
        if self.blank:
            x.masked_fill_(~self.keep.view(-1, *(1,) * (x.dim() - 1)), 0)
        return x


# --- the arithmetic of a chunk ------------------------------------------------------------------

# exp() of it is 0 and 0 times it is 0, which cannot be said of -inf.
FLOOR = -1e30

# At N 2048, D 256, V 32768 in fp32, forward + backward take the same time within noise from
# 256 x 1024 to 1024 x 2048, and at V 16384 with 1024 x 512. Of those a large one: threads wait for
# each other less often. But no wider than a part of the vocabulary, down to half the width, so that
# a rank that has half of 32768 tokens needs half the scratch, too; small ones need little anyway.
CPU_TILE = (1024, 1024)
CPU_PART, CPU_SMALL = 32, 8192


def spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def tile_shape(rows: int, cols: int, device: torch.device, elements: int) -> tuple[int, int]:
    """Rows and columns of a chunk of at most `elements` elements; a GPU wants it large."""
    tall, wide = CPU_TILE
    if device.type == "cpu":
        tall *= max(1, wide // max(cols, 1))  # as many numbers of a small vocabulary
        if cols > CPU_SMALL:
            wide = min(wide, max(wide // 2, cols // CPU_PART))
    else:
        tall, wide = elements // wide, max(wide, elements // max(rows, 1))
    tall = max(1, min(tall, rows, elements))
    return tall, max(1, min(wide, cols, elements // tall))


def scratch(like: Tensor, elements: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(elements, dtype=dtype, device=like.device) for _ in range(count)]


def slab(head: Head | None, wide: int, dtype: torch.dtype) -> Tensor | None:
    """Where rows of a 16-bit weight become `dtype`: always the same memory, as fresh pages take a
    CPU ten times as long as the conversion. None where they are that already."""
    if head is None or head.weight.dtype == dtype:
        return None
    return head.weight.new_empty(wide, head.weight.shape[1], dtype=dtype)


def view(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
    """The front of a flat scratch buffer as a contiguous chunk."""
    n, c = rows.stop - rows.start, cols.stop - cols.start
    return buffer[: n * c].view(n, c)


def accumulator(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to sum what goes into `out`: itself, if it is precise enough."""
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def weighted_rows(x: Tensor, weights: Tensor, spare: Tensor) -> Tensor:
    """weights (n) @ x (n, c) as PyTorch sums, in a tree; overwrites spare (n, c). A product of a
    matrix and a vector adds row after row, and has 50 times the error at 65536 rows."""
    return torch.mul(x, weights.unsqueeze(1), out=spare).sum(0)


class Head(NamedTuple):
    """How hidden states become final logits: scale, then softcap, then temperature."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)
    softcap: float | None
    logit_scale: float

    def columns(self, cols: slice, dtype: torch.dtype, spare: Tensor | None = None) -> Head:
        """The head of a slab of the vocabulary, in the precision of the statistics; see `slab`."""
        bias = None if self.bias is None else self.bias[cols].to(dtype)
        weight = self.weight[cols]
        weight = weight.to(dtype) if spare is None else spare[: len(weight)].copy_(weight)
        return self._replace(weight=weight, bias=bias)

    def inner(self, temperature: Tensor) -> Tensor:  # (n) -> (n, 1)
        """What x is multiplied by before the product: rows of x are far smaller than logits."""
        if self.softcap is None:
            return (self.logit_scale / temperature).unsqueeze(1)
        return torch.full_like(temperature, self.logit_scale / self.softcap).unsqueeze(1)

    def outer(self, temperature: Tensor) -> Tensor | None:  # (n) -> (n, 1)
        return None if self.softcap is None else (self.softcap / temperature).unsqueeze(1)

    def logits(self, x: Tensor, temperature: Tensor, out: Tensor) -> Tensor:
        """Final logits (n, V) in `out`, of x (n, D) and temperature (n)."""
        inner = self.inner(temperature)
        if len(self.weight) > x.shape[1]:  # what is smaller is multiplied
            z = torch.mm(x * inner, self.weight.T, out=out)
        else:
            z = torch.mm(x, self.weight.T, out=out).mul_(inner)
        return self.finish_(z, temperature, self.bias)

    def finish_(self, z: Tensor, temperature: Tensor, bias: Tensor | None) -> Tensor:
        """Final logits in place, of products with x * inner; bias (c) or (n, c)."""
        inner, outer = self.inner(temperature), self.outer(temperature)
        if bias is not None:
            z.addcmul_(inner, bias)
        return z if outer is None else z.tanh_().mul_(outer)


class RowStats(NamedTuple):
    """Running statistics, each (n). `ref_*` and `cross` stay empty without a reference."""

    peak: Tensor
    total: Tensor
    weighted: Tensor
    ref_peak: Tensor
    ref_total: Tensor
    cross: Tensor

    @property
    def entropy(self) -> Tensor:
        return self.total.log() - self.weighted / self.total

    @property
    def kl(self) -> Tensor:
        return self.cross / self.total - self.total.log() + self.ref_total.log()


def below_peak_(z: Tensor) -> Tensor:
    """Turns z (n, c) into z - peak, floored, in place; returns peak (n)."""
    peak = z.amax(1)
    z.sub_(peak.masked_fill(peak == -torch.inf, 0).unsqueeze(1)).clamp_(min=FLOOR)
    return peak


def tile_stats_(z: Tensor, spare: Tensor, ref_z: Tensor | None = None) -> RowStats:
    """The statistics of one chunk. Leaves z - peak in z; overwrites ref_z and spare."""
    none = z.new_empty(0)
    peak = below_peak_(z)
    e = torch.exp(z, out=spare)
    total = e.sum(1)
    if ref_z is None:
        return RowStats(peak, total, e.mul_(z).sum(1), none, none, none)
    ref_peak = ref_z.amax(1)
    ref_z.sub_(ref_peak.unsqueeze(1))
    cross = torch.sub(z, ref_z).mul_(e).masked_fill_(e == 0, 0).sum(1)
    weighted = e.mul_(z).sum(1)
    return RowStats(peak, total, weighted, ref_peak, ref_z.exp_().sum(1), cross)


def pick_target(target_z: Tensor, z: Tensor, targets: Tensor, start: int) -> Tensor:
    """target_z (n), with the logits of the targets that lie in this chunk z (n, c)."""
    local = targets - start
    at = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    return torch.where(local == at.squeeze(1), z.gather(1, at).squeeze(1), target_z)


def merge(a: RowStats, b: RowStats) -> RowStats:
    """The statistics of two sets of columns together."""

    def shifts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = torch.maximum(x, y)
        # Where there was nothing yet, -inf - -inf would be NaN; the sums there are 0.
        dx, dy = (torch.where(old == -torch.inf, 0, old - top) for old in (x, y))
        return top, dx, dy

    peak, da, db = shifts(a.peak, b.peak)
    scale_a, scale_b = da.exp(), db.exp()
    total = scale_a * a.total + scale_b * b.total
    weighted = scale_a * (a.weighted + a.total * da) + scale_b * (b.weighted + b.total * db)
    if not len(a.ref_peak):
        return RowStats(peak, total, weighted, a.ref_peak, a.ref_total, a.cross)
    ref_peak, ra, rb = shifts(a.ref_peak, b.ref_peak)
    ref_total = ra.exp() * a.ref_total + rb.exp() * b.ref_total
    cross = scale_a * (a.cross + a.total * (da - ra)) + scale_b * (b.cross + b.total * (db - rb))
    return RowStats(peak, total, weighted, ref_peak, ref_total, cross)


class RowGrads(NamedTuple):
    """What dZ needs to know of each row, (n) each; see `dlogits_`."""

    targets: Tensor
    peak: Tensor
    total: Tensor
    target_u: Tensor  # of the target's logit, as the forward had it
    ref_peak: Tensor | None
    g_logprob: Tensor
    per_u: Tensor | None  # None where only the log-probability has a gradient
    per_ref_u: Tensor | None
    constant: Tensor | None

    def rows(self, rows: slice | Tensor) -> RowGrads:
        return RowGrads._make(None if x is None else x[rows] for x in self)

    @property
    def factor(self) -> Tensor:
        """By what `dlogits_` is too small: applied to rows of x and dX, which are far smaller."""
        return 1 / self.total if self.per_u is not None else -self.g_logprob / self.total


def row_grads(
    targets: Tensor,
    stats: RowStats,
    logprob: Tensor,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
) -> RowGrads:
    """All upstream gradients folded into one formula. With log p = u - log(total):

    d log p[t] / dz = 1[t] - p,  d entropy / dz = -p (log p + entropy),
    d KL / dz = p (log p - log q - KL), so that

    dz = g_logprob 1[t] + p (constant + per_u * u + per_ref_u * ref_u)
    """
    log_total = stats.total.log()
    first = (targets, stats.peak, stats.total, logprob + log_total)
    if g_entropy is None and g_kl is None:
        return RowGrads(*first, None, g_logprob, None, None, None)
    g_entropy = torch.zeros_like(g_logprob) if g_entropy is None else g_entropy
    constant = -g_logprob - g_entropy * (stats.entropy - log_total)
    if g_kl is None:
        return RowGrads(*first, None, g_logprob, -g_entropy, None, constant)
    constant = constant + g_kl * (stats.ref_total.log() - log_total - stats.kl)
    return RowGrads(*first, stats.ref_peak, g_logprob, g_kl - g_entropy, -g_kl, constant)


def dlogits_(
    z: Tensor,  # (n, c) final logits; overwritten with the result
    spare: Tensor,  # (n, c) overwritten
    ref_z: Tensor | None,  # (n, c) overwritten
    rows: RowGrads,
    start: int,  # the chunk's first column
    outer: Tensor | None,  # (n, 1): softcap / temperature, where there is a softcap
) -> Tensor:
    """The gradient of hidden @ weight.T + bias, short of rows.factor * logit_scale / temperature.

    Those are numbers of a row, so the caller applies them to the rows of x and of dX instead.
    """
    slope = None if outer is None else (z / outer).square_().neg_().add_(1)
    z.sub_(rows.peak.unsqueeze(1)).clamp_(min=FLOOR)
    # Where the policy is confident, 1 - p[target] is far smaller than the rounding of a logit: the
    # target's must be the one that the row's total was made of, not one computed again.
    local = rows.targets - start
    at = local.clamp(0, z.shape[1] - 1)
    inside, column = local == at, at.unsqueeze(1)
    z.scatter_(
        1, column, torch.where(inside.unsqueeze(1), rows.target_u.unsqueeze(1), z.gather(1, column))
    )
    if rows.per_u is None or rows.constant is None:
        # p (-g_logprob) + g_logprob 1[t] = factor * (exp(u) - total 1[t]): no pass for the gradient
        z.exp_()
        at_target = -rows.total
    else:
        e = torch.exp(z, out=spare)
        z.mul_(rows.per_u.unsqueeze(1)).add_(rows.constant.unsqueeze(1))
        if ref_z is not None and rows.ref_peak is not None and rows.per_ref_u is not None:
            ref_z.sub_(rows.ref_peak.unsqueeze(1)).clamp_(min=FLOOR)
            z.addcmul_(ref_z, rows.per_ref_u.unsqueeze(1))
        z.mul_(e)
        at_target = rows.g_logprob * rows.total
    z.scatter_add_(1, column, torch.where(inside, at_target, 0).unsqueeze(1))
    return z if slope is None else z.mul_(slope)
