"""Log-probability, entropy and exact KL of tokens, straight from hidden states.

    z = transform(hidden @ weight.T + bias)            never held: N x V is 4 GB at 8192 x 128256
    logprobs = z[target] - logsumexp(z)
    entropy  = logsumexp(z) - sum(softmax(z) * z)
    kl       = sum(softmax(z) * (log_softmax(z) - log_softmax(ref_z)))

The forward walks the vocabulary once and keeps a few numbers of each row. The backward computes the
logits again, a slab of the vocabulary at a time, and forms the gradient of all three in one
formula: a slab of dW leaves one product at full length, and only dX is accumulated, in fp32.

Read downward: chunked PyTorch (backend "reference"), custom operations, public function. The Triton
half is linear_logprobs_triton.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.settings import workspace_for
from gikernels.backends.symbols import changing, settled
from gikernels.reference import Support, TokenStats, stat_dtype
from gikernels.vocabulary.head import (
    Head,
    Kept,
    RowGrads,
    RowStats,
    accumulator,
    check_values,
    choose_backend,
    dlogits_,
    full_precision,
    head_arguments,
    merge,
    pick_target,
    reference_arguments,
    row_grads,
    row_temperature,
    scratch,
    slab,
    spans,
    temperature_arguments,
    tile_shape,
    tile_stats_,
    transform_arguments,
    view,
    weighted_rows,
)
from gikernels.vocabulary.linear_logprobs_parts import parts
from gikernels.vocabulary.split import local_head
from gikernels.vocabulary.support import support_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# --- chunked PyTorch ----------------------------------------------------------------------------


def _tile(n: int, v: int, like: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """A chunk's shape. Up to four live at once: z, its exponential, the reference's z, a slope."""
    return tile_shape(n, v, like.device, workspace_for(like.device) // (4 * dtype.itemsize))


def _forward_rows(
    x: Tensor,  # (n, D)
    targets: Tensor,  # (n)
    temperature: Tensor,  # (n)
    head: Head,
    ref_x: Tensor | None,  # (n, D')
    ref_head: Head | None,
    wide: int,
) -> tuple[Tensor, RowStats]:
    """The target's logit minus the row's peak, and the statistics, of a few rows."""
    dtype, all_rows = temperature.dtype, slice(0, len(x))
    z, spare, *ref_z = scratch(x, len(x) * wide, 2 if ref_head is None else 3, dtype)
    target_z, stats = torch.full_like(temperature, torch.nan), None
    own, ref_own = (slab(each, wide, dtype) for each in (head, ref_head))
    for cols in spans(len(head.weight), wide):
        tile = head.columns(cols, dtype, own).logits(x, temperature, view(z, all_rows, cols))
        target_z = pick_target(target_z, tile, targets, cols.start)
        ref_tile = None
        if ref_head is not None and ref_x is not None:
            ref_tile = view(ref_z[0], all_rows, cols)
            ref_head.columns(cols, dtype, ref_own).logits(ref_x, temperature, ref_tile)
        new = tile_stats_(tile, view(spare, all_rows, cols), ref_tile)
        stats = new if stats is None else merge(stats, new)
    assert stats is not None
    return target_z - stats.peak, stats


def _forward_chunked(
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = temperature.dtype
    kept = Kept(targets != ignore_index)
    logprobs, entropy, kl, stats = (x.zero_() for x in _outputs(hidden, ref_hidden, dtype))
    tall, wide = _tile(len(kept), len(head.weight), hidden, dtype)
    for chunk in spans(len(kept), tall):
        rows = chunk if kept.all else kept.rows[chunk]
        target_u, row = _forward_rows(
            hidden[rows].to(dtype),
            targets[rows].long(),
            temperature[rows],
            head,
            None if ref_hidden is None else ref_hidden[rows].to(dtype),
            ref_head,
            wide,
        )
        logprobs[rows] = target_u - row.total.log()
        entropy[rows] = row.entropy
        stats[:, rows] = torch.stack([x for x in row if len(x)])
        if ref_head is not None:
            kl[rows] = row.kl
    for out in (logprobs, entropy, *((kl,) if ref_head is not None else ())):
        kept.clear_(out)
    return logprobs, entropy, kl, stats


def _backward_chunked(
    hidden: Tensor,  # (n, D): as all that follows, only the rows that have a gradient
    temperature: Tensor,  # (n)
    head: Head,
    ref_hidden: Tensor | None,  # (n, D')
    ref_head: Head | None,
    grads: RowGrads,
    dx: Tensor | None,  # (n, D) zeros, in the precision of the statistics
    dw: Tensor | None,  # (V, D)
    db: Tensor | None,  # (V)
) -> None:
    """Fills dx, dw and db where they are wanted."""
    n, v, dtype = len(hidden), len(head.weight), temperature.dtype
    tall, wide = _tile(n, v, hidden, dtype)
    z, spare, *ref_z = scratch(hidden, tall * wide, 2 if ref_head is None else 3, dtype)
    outer = head.outer(temperature)
    back = grads.factor * head.logit_scale / temperature
    own, ref_own = (slab(each, wide, dtype) for each in (head, ref_head))
    for cols in spans(v, wide):
        some = head.columns(cols, dtype, own)
        ref_some = None if ref_head is None else ref_head.columns(cols, dtype, ref_own)
        slab_dw = None if dw is None else accumulator(dw[cols], dtype)
        slab_db = None if db is None else accumulator(db[cols], dtype)
        for rows in spans(n, tall):
            x, t = hidden[rows].to(dtype), temperature[rows]
            ref_tile = None
            if ref_some is not None and ref_hidden is not None:
                ref_tile = view(ref_z[0], rows, cols)
                ref_some.logits(ref_hidden[rows].to(dtype), t, ref_tile)
            tile = dlogits_(
                some.logits(x, t, view(z, rows, cols)),
                view(spare, rows, cols),
                ref_tile,
                grads.rows(rows),
                cols.start,
                None if outer is None else outer[rows],
            )
            if dx is not None:
                dx[rows].addmm_(tile, some.weight)
            if slab_dw is not None:
                slab_dw.addmm_(tile.T, x * back[rows].unsqueeze(1), beta=int(rows.start > 0))
            if slab_db is not None:
                part = weighted_rows(tile, back[rows], view(spare, rows, cols))
                slab_db.copy_(part if rows.start == 0 else slab_db + part)
        if dw is not None and slab_dw is not None:
            dw[cols] = slab_dw  # rounds once; the same memory where the precision is the same
        if db is not None and slab_db is not None:
            db[cols] = slab_db
    if dx is not None:
        dx.mul_(back.unsqueeze(1))


# --- custom operations --------------------------------------------------------------------------


def _outputs(
    hidden: Tensor, ref_hidden: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised logprobs, entropy, kl and the statistics of RowStats, one row each."""
    n, has_ref = hidden.shape[0], ref_hidden is not None  # len() would fix a symbolic length
    logprobs, entropy = (hidden.new_empty(n, dtype=dtype) for _ in range(2))
    kl = hidden.new_empty(n if has_ref else 0, dtype=dtype)
    stats = hidden.new_empty(6 if has_ref else 3, n, dtype=dtype)
    return logprobs, entropy, kl, stats


@torch.library.custom_op(
    "gikernels::linear_logprobs", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N)
    temperature: float,
    temperatures: Tensor | None,  # (N), then `temperature` is 1
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ignore_index: int,
    backend: str,  # "reference" or "triton", as dispatch.choose returned it
    carried: Tensor | None = None,  # the three numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, kl (empty without a reference), and statistics for the backward."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    if hidden.device.type == "cpu":
        kept = targets != ignore_index
        some = None if temperatures is None else temperatures[kept]
        check_values(targets[kept], some, len(weight))
    if backend == "triton":
        from gikernels.vocabulary import linear_logprobs_triton

        outputs = _outputs(hidden, ref_hidden, torch.float32)
        linear_logprobs_triton.forward(
            hidden, weight, targets, temperature, temperatures, bias, softcap, logit_scale,
            ref_hidden, ref_weight, ignore_index, *outputs,
        )  # fmt: skip
        return outputs
    return _forward_chunked(
        hidden,
        targets,
        row_temperature(hidden, weight, temperature, temperatures),
        Head(weight, bias, softcap, logit_scale),
        ref_hidden,
        None if ref_weight is None else Head(ref_weight, None, softcap, logit_scale),
        ignore_index,
    )


@_op.register_fake
def _(hidden, weight, targets, temperature, temperatures, bias, softcap, scale, ref_hidden, *_):
    return _outputs(hidden, ref_hidden, stat_dtype(hidden, weight))


@torch.library.custom_op(
    "gikernels::linear_logprobs_backward", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _backward_op(
    g_logprobs: Tensor | None,  # (N)
    g_entropy: Tensor | None,  # (N)
    g_kl: Tensor | None,  # (N)
    logprobs: Tensor,  # (N), as stats from the forward
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ignore_index: int,
    backend: str,
    wanted: list[bool],  # gradients of hidden, weight, bias
    exact: bool = False,  # whether that of hidden stays in the precision of the statistics
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    dhidden, dweight, dbias = _gradients(hidden, weight, bias, wanted, exact)
    upstream = [g_logprobs, g_entropy, g_kl]
    # Masked, clipped or zero-advantage rows have no gradient: they cost nothing from here on.
    zero = torch.zeros_like(targets, dtype=torch.bool)
    alive = torch.stack([zero if g is None else g != 0 for g in upstream])
    alive &= targets != ignore_index
    kept = Kept(alive.any(0))
    if len(kept) == 0:
        return dhidden.zero_(), dweight.zero_(), dbias.zero_()
    pick, dtype = kept.pick, stats.dtype
    some = [True] * 3 if kept.blank else alive.any(1).tolist()
    g = [pick(g) if g is not None and yes else None for g, yes in zip(upstream, some)]
    g_logprob = hidden.new_zeros(len(kept), dtype=dtype) if g[0] is None else g[0]
    if g[2] is None:  # then the reference's logits are not needed
        ref_hidden = ref_weight = None
    x, target, logprob = pick(hidden), pick(targets), pick(logprobs)
    ref_x = None if ref_hidden is None else pick(ref_hidden)
    temperatures = None if temperatures is None else pick(temperatures, 1)
    none = stats[:0, 0]
    row_stats = RowStats._make(
        pick(stats[i], fill=i in (1, 4)) if i < len(stats) else none  # no total is 0
        for i in range(6)
    )
    in_place = dhidden.dtype == dtype and kept.all
    dx = (dhidden if in_place else dhidden.new_empty(x.shape, dtype=dtype)) if wanted[0] else None
    dw, db = (dweight if wanted[1] else None), (dbias if wanted[2] else None)
    if dx is not None:
        dx.zero_()
    if backend == "triton":
        from gikernels.vocabulary import linear_logprobs_triton

        linear_logprobs_triton.backward(
            x, weight, target, temperature, temperatures, bias, softcap, logit_scale,
            ref_x, ref_weight, row_stats, logprob, g_logprob, g[1], g[2], dx, dw, db,
        )  # fmt: skip
    else:
        _backward_chunked(
            x,
            row_temperature(x, weight, temperature, temperatures),
            Head(weight, bias, softcap, logit_scale),
            ref_x,
            None if ref_weight is None else Head(ref_weight, None, softcap, logit_scale),
            row_grads(target.long(), row_stats, logprob, g_logprob, g[1], g[2]),
            dx,
            dw,
            db,
        )
    if dx is not None and not in_place:
        dhidden.zero_()[kept.rows] = dx.to(dhidden.dtype)
    return dhidden, dweight, dbias


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients, contiguous whatever the strides; empty where they are not wanted."""
    shapes = [hidden.shape, weight.shape, weight.shape[:1]]
    dtypes = [x.dtype for x in (hidden, weight, weight if bias is None else bias)]
    if exact:
        dtypes[0] = stat_dtype(hidden, weight)
    dx, dw, db = (
        hidden.new_empty(s if want else 0, dtype=d) for s, want, d in zip(shapes, wanted, dtypes)
    )
    return dx, dw, db


@_backward_op.register_fake
def _(
    g_logprobs, g_entropy, g_kl, logprobs, stats, hidden, weight, targets, temperature,
    temperatures, bias, softcap, logit_scale, ref_hidden, ref_weight, ignore_index, backend,
    wanted, exact=False, carried=None,
):  # fmt: skip
    return _gradients(hidden, weight, bias, wanted, exact)


def _setup(ctx, inputs, output):
    hidden, weight, targets, _, temperatures, bias, _, _, ref_hidden, ref_weight, _, _, c = inputs
    ctx.numbers = (inputs[3], inputs[6], inputs[7], inputs[10], inputs[11])
    ctx.save_for_backward(
        hidden, weight, targets, temperatures, bias, ref_hidden, ref_weight, c, output[0], output[3]
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, g_logprobs, g_entropy, g_kl, g_stats):
    (
        hidden, weight, targets, temperatures, bias, ref_hidden, ref_weight, carried, logprobs,
        stats,
    ) = ctx.saved_tensors  # fmt: skip
    temperature, softcap, logit_scale, ignore_index, backend = ctx.numbers
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
    if ref_hidden is None:  # kl is empty; torch.compile hands over an empty gradient of it
        g_kl = None
    dhidden, dweight, dbias = _backward_op(
        g_logprobs, g_entropy, g_kl, logprobs, stats, hidden, weight, targets, temperature,
        temperatures, bias, softcap, logit_scale, ref_hidden, ref_weight, ignore_index, backend,
        wanted, False, carried,
    )  # fmt: skip
    grads = [g if want else None for g, want in zip((dhidden, dweight, dbias), wanted)]
    return (grads[0], grads[1], None, None, None, grads[2], *(None,) * 7)


_op.register_autograd(_backward, setup_context=_setup)


# --- public -------------------------------------------------------------------------------------


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D), of the same dtype
    targets: Tensor,  # (...) integers
    temperature: float | Tensor = 1.0,  # a number, or (...); no gradient
    *,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref: tuple[Tensor, Tensor] | None = None,  # (..., D'), (V, D'); no gradient, no bias
    ignore_index: int = -100,
    support: Support | None = None,  # of the rows in order
    vocab_group: ProcessGroup | None = None,  # over which the rows of weight and bias are split
    backend: str = "auto",  # "triton" or "reference"
) -> TokenStats:
    """Log-probability of each target, entropy, and exact KL(pi || ref), without the logits:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) / temperature
        logp = z.log_softmax(-1)
        logprobs = logp.gather(-1, targets[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)           # None without `ref`

    Each is (...) in fp32 (fp64 for fp64 inputs), all three are differentiable in hidden, weight and
    bias, and rows whose target is ignore_index give 0. A frozen weight costs no dW; the backward
    leaves out rows whose upstream gradients are zero. Scratch memory:
    gikernels.backends.settings. On a GPU a target out of range gives NaN; on a CPU it raises.

    With `support`, logp and ref_logp are renormalised over the tokens that a row could be sampled
    from, at the cost of those where they are few; where they are many, PyTorch forms their logits
    on every backend. A target that is none of them gives -inf, and its log-probability no gradient.

    With `vocab_group`, each rank passes its part of the vocabulary, parts of any size in rank order
    (of ref[1], too), the same hidden states and targets in the whole vocabulary. Every rank returns
    the same; the gradients of weight and bias are its own, that of hidden is summed. A DTensor
    weight placed Shard(0) on a mesh of one dimension is taken so by itself.
    """
    hidden, weight, bias, ref, group = local_head(hidden, weight, bias, ref, vocab_group)
    hidden, weight, bias = head_arguments(hidden, weight, targets, bias, part=bool(group))
    ref_hidden, ref_weight = reference_arguments(ref, hidden, weight)
    temperature, temperatures = temperature_arguments(temperature, targets)
    softcap, logit_scale = transform_arguments(softcap, logit_scale)
    carried, (temperature, softcap, logit_scale) = changing(temperature, softcap, logit_scale)
    checks.whole("ignore_index", ignore_index, at_least=-(2**63))
    shape = targets.shape
    if targets.element_size() < 4:  # -100 is 156 to a uint8
        targets = targets.long()
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        temperature,
        None if temperatures is None else temperatures.reshape(-1),
        bias,
        softcap,
        logit_scale,
        None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ignore_index,
    )
    chosen = choose_backend(backend, hidden)
    offsets, ids = support_arguments(support, targets)
    if offsets is None and not group:
        logprobs, entropy, kl, _ = _op(*arguments, chosen, carried)
    else:
        logprobs, entropy, kl, *_ = parts(*arguments, offsets, ids, group, chosen, carried)
    return TokenStats(
        logprobs.view(shape), entropy.view(shape), None if ref is None else kl.view(shape)
    )
