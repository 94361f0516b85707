"""linear_logprobs of parts: of a vocabulary split over ranks, of rows with a support, of both.

    support.py    rows that have one, by the cost of their kept ids
    the op itself gikernels::linear_logprobs, on all other rows and this rank's columns
    split.py      the parts' statistics become those of the whole

Both give the same few numbers of a row (head.RowStats), from which all results and the gradient of
every logit follow. Read downward: forward, backward, each a custom op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.backends import dispatch
from gikernels.backends.symbols import settled
from gikernels.reference import stat_dtype
from gikernels.vocabulary import split, support
from gikernels.vocabulary.head import (
    Head,
    RowStats,
    check_values,
    full_precision,
    row_grads,
    row_temperature,
)

# Of a row that does not count, whatever the caller's ignore_index is.
IGNORED = -100

# --- forward ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::linear_logprobs_parts", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def parts(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of this rank
    targets: Tensor,  # (N), in the whole vocabulary
    temperature: float,
    temperatures: Tensor | None,  # (N), then `temperature` is 1
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ignore_index: int,
    offsets: Tensor | None,  # (N + 1) of the support
    ids: Tensor | None,
    group: str,  # its name, or ""
    backend: str,
    carried: Tensor | None = None,  # the three numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, kl (empty without a reference), and for the backward: statistics, targets
    within this part, its size where they are elsewhere, and where it starts."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    support.refuse_capture(hidden)
    size, kept = len(weight), targets != ignore_index
    start, vocab = split.place(size, targets.long(), group)
    _check(targets, kept, temperatures, offsets, ids, vocab)
    local = targets.long() - start
    mine = kept & (local >= 0) & (local < size)
    local = local.where(mine, size).where(kept, IGNORED)
    temperature_n = row_temperature(hidden, weight, temperature, temperatures)
    stats = hidden.new_zeros(3 if ref_weight is None else 6, len(hidden), dtype=temperature_n.dtype)
    stats[::3] = -torch.inf  # peak and ref_peak, of nothing yet
    target_u = torch.full_like(stats[0], -torch.inf)
    rest = _without_support(kept, offsets)
    if size and rest.any():
        logprobs, _, _, all_stats = torch.ops.gikernels.linear_logprobs(
            hidden, weight, local.where(mine, 0).where(rest, IGNORED), temperature, temperatures,
            bias, softcap, logit_scale, ref_hidden, ref_weight, IGNORED, backend,
        )  # fmt: skip
        stats = torch.where(rest, all_stats, stats)
        target_u = torch.where(rest & mine, logprobs + all_stats[1].log(), target_u)
    if offsets is not None and ids is not None:
        support.forward(
            support.Rows(hidden, local, temperature_n, ref_hidden),
            _sets(offsets, ids, start, size, group),
            (kept & ~rest).nonzero().squeeze(1),
            Head(weight, bias, softcap, logit_scale),
            None if ref_weight is None else Head(ref_weight, None, softcap, logit_scale),
            stats,
            target_u,
            backend,
        )
    if group:
        stats, target_u = split.merged(stats, target_u, group)
    row = RowStats._make([*stats, *[stats[0, :0]] * 3][:6])
    results = [target_u - row.total.log(), row.entropy]
    kl = row.kl.masked_fill(~kept, 0) if ref_weight is not None else stats.new_empty(0)
    logprobs, entropy = (x.masked_fill(~kept, 0) for x in results)
    return logprobs, entropy, kl, stats, local, local.new_full((), start)


def _without_support(kept: Tensor, offsets: Tensor | None) -> Tensor:
    return kept if offsets is None else kept & (offsets.diff() == 0)


def _sets(offsets: Tensor, ids: Tensor, start: int, size: int, group: str) -> support.Sets:
    sets = support.Sets(offsets, ids)
    return sets.part(start, size) if group else sets


def _check(
    targets: Tensor,
    kept: Tensor,
    temperatures: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    vocab: int,
) -> None:
    if targets.device.type != "cpu":
        return
    check_values(targets[kept], None if temperatures is None else temperatures[kept], vocab)
    if offsets is not None and ids is not None:
        support.check_support(offsets, ids, vocab)


@parts.register_fake
def _(
    hidden, weight, targets, temperature, temperatures, bias, softcap, logit_scale, ref_hidden,
    ref_weight, ignore_index, offsets, ids, group, backend, carried=None,
):  # fmt: skip
    n, dtype, has_ref = hidden.shape[0], stat_dtype(hidden, weight), ref_hidden is not None
    logprobs, entropy = (hidden.new_empty(n, dtype=dtype) for _ in range(2))
    kl = hidden.new_empty(n if has_ref else 0, dtype=dtype)
    stats = hidden.new_empty(6 if has_ref else 3, n, dtype=dtype)
    local, where = (hidden.new_empty(shape, dtype=torch.int64) for shape in ((n,), ()))
    return logprobs, entropy, kl, stats, local, where


# --- backward -----------------------------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::linear_logprobs_parts_backward", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _backward_op(
    g_logprobs: Tensor | None,  # (N)
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    logprobs: Tensor,  # (N); this and the next three from the forward
    stats: Tensor,
    local: Tensor,
    where: Tensor,
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    group: str,
    backend: str,
    wanted: list[bool],  # gradients of hidden, weight, bias
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, summed over the group, and of this rank's weight and bias."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    size, kept, dtype = len(weight), local != IGNORED, stats.dtype
    rest = _without_support(kept, offsets)
    dx = dw = db = None
    if size and rest.any():
        parts = torch.ops.gikernels.linear_logprobs_backward(
            g_logprobs, g_entropy, g_kl, logprobs, stats, hidden, weight,
            local.where(rest, IGNORED), temperature, temperatures, bias, softcap, logit_scale,
            ref_hidden, ref_weight, IGNORED, backend, wanted, True,
        )  # fmt: skip
        dx, dw, db = (x if yes else None for x, yes in zip(parts, wanted))
    if dx is None and wanted[0]:
        dx = hidden.new_zeros(hidden.shape, dtype=dtype)
    if offsets is not None and ids is not None:
        alive = torch.zeros_like(kept)
        for g in (g_logprobs, g_entropy, g_kl):
            alive = alive if g is None else alive | (g != 0)
        alive &= kept & ~rest
        db_kept = weight.new_zeros(size, dtype=dtype) if wanted[2] else None
        g_logprob = torch.zeros_like(logprobs) if g_logprobs is None else g_logprobs
        dw_kept = support.backward(
            support.Rows(
                hidden, local, row_temperature(hidden, weight, temperature, temperatures),
                None if g_kl is None else ref_hidden,
            ),
            _sets(offsets, ids, int(where), size, group),
            alive.nonzero().squeeze(1),
            Head(weight, bias, softcap, logit_scale),
            None if ref_weight is None else Head(ref_weight, None, softcap, logit_scale),
            row_grads(
                local,
                RowStats._make([*stats, *[stats[0, :0]] * 3][:6]),
                logprobs,
                g_logprob.masked_fill(logprobs == -torch.inf, 0),  # its target was not kept
                g_entropy,
                g_kl,
            ),
            dx,
            wanted[1],
            db_kept,
            backend,
        )  # fmt: skip
        dw, db = _sum(dw, dw_kept), _sum(db, db_kept)
    gradients = (dx if dx is None else split.summed_(dx, group), dw, db)
    return _outputs(hidden, weight, bias, wanted, gradients)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: list[bool],
    gradients: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As autograd wants them: of the inputs' dtypes, contiguous; empty where they are not wanted,
    zeros where nothing gives any."""
    likes = (hidden, weight, weight if bias is None else bias)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (
        (like.new_zeros(shape if yes else 0) if x is None else x.to(like.dtype).contiguous())
        for like, shape, yes, x in zip(likes, shapes, wanted, gradients or (None,) * 3)
    )
    return dx, dw, db


@_backward_op.register_fake
def _(
    g_logprobs, g_entropy, g_kl, logprobs, stats, local, where, hidden, weight, temperature,
    temperatures, bias, softcap, logit_scale, ref_hidden, ref_weight, offsets, ids, group, backend,
    wanted, carried=None,
):  # fmt: skip
    return _outputs(hidden, weight, bias, wanted)


def _setup(ctx, inputs, output):
    (
        hidden, weight, _, temperature, temperatures, bias, softcap, logit_scale, ref_hidden,
        ref_weight, _, offsets, ids, group, backend, carried,
    ) = inputs  # fmt: skip
    logprobs, _, _, stats, local, where = output
    ctx.mark_non_differentiable(stats, local, where)
    ctx.numbers = (temperature, softcap, logit_scale, group, backend)
    ctx.save_for_backward(
        logprobs, stats, local, where, hidden, weight, temperatures, bias, ref_hidden, ref_weight,
        offsets, ids, carried,
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def _backward(ctx, g_logprobs, g_entropy, g_kl, *_):
    (
        logprobs, stats, local, where, hidden, weight, temperatures, bias, ref_hidden, ref_weight,
        offsets, ids, carried,
    ) = ctx.saved_tensors  # fmt: skip
    temperature, softcap, logit_scale, group, backend = ctx.numbers
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    if ref_hidden is None:  # kl is empty
        g_kl = None
    gradients = _backward_op(
        g_logprobs, g_entropy, g_kl, logprobs, stats, local, where, hidden, weight, temperature,
        temperatures, bias, softcap, logit_scale, ref_hidden, ref_weight, offsets, ids, group,
        backend, wanted, carried,
    )  # fmt: skip
    dx, dw, db = (g if yes else None for g, yes in zip(gradients, wanted))
    return (dx, dw, None, None, None, db, *(None,) * 10)


parts.register_autograd(_backward, setup_context=_setup)
