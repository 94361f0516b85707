"""Log-probabilities of K given tokens of each row, straight from hidden states.

    z = transform(hidden @ weight.T + bias)            never held
    logprobs = z.gather(1, ids) - logsumexp(z)

What a teacher's top-k, a kept set or candidates to compare need: one walk over the vocabulary for
all K of a row. With upstream gradients g_k and G = sum_k g_k,

    dz_v = sum_k g_k [v = id_k] - G p_v

so a chunk of dZ is a multiple of its probabilities, but at the given tokens. There it is written
from the forward's own log-probabilities: a confident policy's 1 - p is smaller than the rounding of
a logit that is computed again.

Read downward: chunked PyTorch, custom operations, public function. The Triton half is
gather_logprobs_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.settings import workspace_for
from gikernels.backends.symbols import changing, settled
from gikernels.reference import stat_dtype
from gikernels.vocabulary.head import (
    FLOOR,
    Head,
    Kept,
    accumulator,
    choose_backend,
    full_precision,
    head_arguments,
    spans,
    temperature_arguments,
    tile_shape,
    transform_arguments,
    weighted_rows,
)
from gikernels.vocabulary.totals import merge_totals, row_temperatures, tile_total

# --- chunked PyTorch ----------------------------------------------------------------------------


def _tiles(n: int, v: int, like: Tensor, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """Rows and columns of a chunk of logits, and memory for two of them."""
    tall, wide = tile_shape(n, v, like.device, workspace_for(like.device) // (2 * dtype.itemsize))
    return tall, wide, torch.empty(2, tall * (wide + 1), dtype=dtype, device=like.device)


def _columns(ids: Tensor, cols: slice) -> Tensor:
    """Where ids stand in a chunk; one beyond its last column for those that are not in it."""
    size = cols.stop - cols.start
    local = ids - cols.start
    return torch.where((local >= 0) & (local < size), local, size)


def _view(buffer: Tensor, n: int, cols: slice) -> tuple[Tensor, Tensor]:
    """A chunk (n, c), and the same with one column more, for `_columns` of what is elsewhere."""
    c = cols.stop - cols.start
    wider = buffer[: n * (c + 1)].view(n, c + 1)
    return wider[:, :c], wider


def _forward_chunked(
    hidden: Tensor,  # (n, D)
    ids: Tensor,  # (n, K)
    temperature: Tensor,  # (n)
    head: Head,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, K), and peak and total of each row (2, n)."""
    n, v, dtype = len(hidden), len(head.weight), temperature.dtype
    picked = torch.full(ids.shape, torch.nan, dtype=dtype, device=hidden.device)
    stats = hidden.new_zeros(2, n, dtype=dtype)
    stats[0] = -torch.inf
    tall, wide, memory = _tiles(n, v, hidden, dtype)
    for rows in spans(n, tall):
        x, t = hidden[rows].to(dtype), temperature[rows]
        for cols in spans(v, wide):
            z, wider = _view(memory[0], len(x), cols)
            head.columns(cols, dtype).logits(x, t, z)
            at = _columns(ids[rows], cols)
            inside = at < z.shape[1]
            picked[rows] = torch.where(inside, wider.gather(1, at), picked[rows])
            here = tile_total(z, _view(memory[1], len(x), cols)[0])
            stats[:, rows] = merge_totals(stats[:, rows], here)
    return (picked - stats[0].unsqueeze(1)) - stats[1].log().unsqueeze(1), stats


def at_ids(
    g: Tensor,  # (n, K)
    logprobs: Tensor,  # (n, K)
    stats: Tensor,  # (2, n)
    ids: Tensor,  # (n, K)
    head: Head,
    temperature: Tensor,  # (n)
) -> Tensor:
    """d loss / d (final logit) times the softcap's slope at the given tokens, (n, K): the same
    number for the same token."""
    order = ids.argsort(1)
    sorted_ids = ids.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    which = first.cumsum(1) - 1  # of a row's distinct ids
    sums = torch.zeros_like(g).scatter_add_(1, which, g.gather(1, order))
    dz = torch.empty_like(g).scatter_(1, order, sums.gather(1, which))
    dz = dz - g.sum(1, keepdim=True) * logprobs.exp()
    outer = head.outer(temperature)
    if outer is None:
        return dz
    z = logprobs + stats[1].log().unsqueeze(1) + stats[0].unsqueeze(1)
    return dz * (1 - (z / outer).square())


def _backward_chunked(
    exact: Tensor,  # (n, K): of `at_ids`
    total_g: Tensor,  # (n): the sum of a row's upstream gradients
    stats: Tensor,  # (2, n)
    hidden: Tensor,  # (n, D): as all others, only the rows that have a gradient
    ids: Tensor,  # (n, K)
    temperature: Tensor,  # (n)
    head: Head,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (in the precision of the statistics), weight and bias."""
    n, v, dtype = len(hidden), len(head.weight), temperature.dtype
    dx = hidden.new_zeros(hidden.shape, dtype=dtype) if wanted[0] else None
    dw = head.weight.new_empty(head.weight.shape) if wanted[1] else None
    db = head.weight.new_empty(v) if wanted[2] else None
    tall, wide, memory = _tiles(n, v, hidden, dtype)
    back = head.logit_scale / temperature
    outer = head.outer(temperature)
    share = (-total_g / stats[1]).unsqueeze(1)
    for cols in spans(v, wide):
        slab = head.columns(cols, dtype)
        slab_dw = None if dw is None else accumulator(dw[cols], dtype)
        slab_db = None if db is None else accumulator(db[cols], dtype)
        for rows in spans(n, tall):
            x, first = hidden[rows].to(dtype), rows.start == 0
            z, wider = _view(memory[0], len(x), cols)
            slab.logits(x, temperature[rows], z)
            slope = None
            if outer is not None:
                slope = torch.div(z, outer[rows], out=_view(memory[1], len(x), cols)[0])
                slope.square_().neg_().add_(1)
            z.sub_(stats[0, rows].unsqueeze(1)).clamp_(min=FLOOR).exp_().mul_(share[rows])
            if slope is not None:
                z.mul_(slope)
            wider.scatter_(1, _columns(ids[rows], cols), exact[rows])
            if dx is not None:
                dx[rows].addmm_(z, slab.weight)
            if slab_dw is not None:
                slab_dw.addmm_(z.T, x * back[rows].unsqueeze(1), beta=1 - first)
            if slab_db is not None:
                part = weighted_rows(z, back[rows], z)
                slab_db.copy_(part if first else slab_db + part)
        if dw is not None and slab_dw is not None:
            dw[cols] = slab_dw
        if db is not None and slab_db is not None:
            db[cols] = slab_db
    if dx is not None:
        dx.mul_(back.unsqueeze(1))
    return dx, dw, db


# --- custom operations --------------------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::linear_gather_logprobs", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K) int64
    temperatures: Tensor,  # (N) in the precision of the statistics
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,  # "reference" or "triton", as dispatch.choose returned it
    carried: Tensor | None = None,  # the two numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, K), and peak and total of each row (2, N) for the backward."""
    softcap, logit_scale = settled(carried, softcap, logit_scale)
    given = ids >= 0
    if hidden.device.type == "cpu":
        _check_values(ids, temperatures, given, len(weight))
    kept = Kept(given.any(1))
    x, some, t = kept.pick(hidden), kept.pick(ids), kept.pick(temperatures, 1)
    head = Head(weight, bias, softcap, logit_scale)
    if backend == "triton":
        from gikernels.vocabulary import gather_logprobs_triton

        found, found_stats = gather_logprobs_triton.forward(x, some, t, head)
    else:
        found, found_stats = _forward_chunked(x, some, t, head)
    logprobs, stats = _outputs(hidden, ids, temperatures)
    logprobs[kept.rows], stats[:, kept.rows] = found, found_stats
    # What is no token is NaN, not a plausible number.
    out_of_range = ids >= len(weight)
    return logprobs.masked_fill_(out_of_range, torch.nan).masked_fill_(~given, 0), stats


def _outputs(hidden: Tensor, ids: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    dtype = temperatures.dtype
    return (
        hidden.new_zeros(ids.shape, dtype=dtype),
        hidden.new_ones(2, hidden.shape[0], dtype=dtype),
    )


def _check_values(ids: Tensor, temperatures: Tensor, given: Tensor, v: int) -> None:
    bad = (ids < -1) | (ids >= v)
    if bad.any():
        raise checks.wrong("ids", ids[bad][0].item(), f"0 <= id < {v}, or -1 for none")
    low = temperatures[given.any(1)]
    if (low <= 0).any():
        raise checks.wrong("temperature", low.min().item(), "numbers > 0")


@_op.register_fake
def _(hidden, weight, ids, temperatures, bias, softcap, logit_scale, backend, carried=None):
    return _outputs(hidden, ids, temperatures)


@torch.library.custom_op(
    "gikernels::linear_gather_logprobs_backward", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _backward_op(
    g: Tensor,  # (N, K)
    logprobs: Tensor,  # (N, K), as stats from the forward
    stats: Tensor,  # (2, N)
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperatures: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    wanted: list[bool],  # gradients of hidden, weight, bias
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    softcap, logit_scale = settled(carried, softcap, logit_scale)
    g = g.where(ids >= 0, 0)
    kept = Kept((g != 0).any(1))
    x, some, t = kept.pick(hidden), kept.pick(ids, -1), kept.pick(temperatures, 1)
    g, of_row = kept.pick(g), torch.stack([kept.pick(s, 1) for s in stats])
    head = Head(weight, bias, softcap, logit_scale)
    exact = at_ids(g, kept.pick(logprobs), of_row, some, head, t)
    given = (exact, g.sum(1), of_row, x, some, t, head, wanted)
    if backend == "triton":
        from gikernels.vocabulary import gather_logprobs_triton

        dx, dw, db = gather_logprobs_triton.backward(*given)
    else:
        dx, dw, db = _backward_chunked(*given)
    dhidden, dweight, dbias = _gradients(hidden, weight, bias, wanted)
    if dx is not None:
        dhidden.zero_()[kept.rows] = dx.to(dhidden.dtype)
    for out, found in ((dweight, dw), (dbias, db)):
        if found is not None:
            out.copy_(found) if len(kept) else out.zero_()
    return dhidden, dweight, dbias


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients, contiguous whatever the strides; empty where they are not wanted."""
    shapes = [hidden.shape, weight.shape, weight.shape[:1]]
    likes = [hidden, weight, weight if bias is None else bias]
    dx, dw, db = (x.new_empty(s if want else 0) for x, s, want in zip(likes, shapes, wanted))
    return dx, dw, db


@_backward_op.register_fake
def _(
    g, logprobs, stats, hidden, weight, ids, temperatures, bias, softcap, logit_scale, backend,
    wanted, carried=None,
):  # fmt: skip
    return _gradients(hidden, weight, bias, wanted)


def _setup(ctx, inputs, output):
    *tensors, softcap, logit_scale, backend, carried = inputs
    ctx.numbers = (softcap, logit_scale, backend)
    ctx.save_for_backward(*output, *tensors, carried)
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _):
    if g is None:
        return (None,) * 9
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    *tensors, carried = ctx.saved_tensors
    gradients = _backward_op(g, *tensors, *ctx.numbers, wanted, carried)
    dx, dw, db = (g if want else None for g, want in zip(gradients, wanted))
    return dx, dw, None, None, db, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


# --- public -------------------------------------------------------------------------------------


def linear_gather_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of the same dtype
    ids: Tensor,  # (N, K) integers; -1: none
    temperature: float | Tensor = 1.0,  # a number, or (N); no gradient
    *,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",  # "triton" or "reference"
) -> Tensor:
    """Log-probabilities (N, K) of K given tokens of each row, without the logits:

        z = logit_scale * F.linear(hidden, weight, bias).float()
        z = softcap * torch.tanh(z / softcap) / temperature
        return z.log_softmax(-1).gather(1, ids)

    In fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias. An id of -1 gives 0
    and has no gradient; a row of them costs nothing. The same id may come twice. On a GPU an id out
    of range gives NaN; on a CPU it raises.
    """
    checks.dims("hidden", checks.floats("hidden", hidden), 2, "(N, D)")
    checks.dims("ids", checks.ints("ids", ids), 2, "(N, K)")
    checks.shape("ids", ids, (hidden.shape[0], ids.shape[1]), "(N, K) with the N of hidden")
    checks.same_device(hidden=hidden, ids=ids)
    rows = ids.new_empty(ids.shape[0])  # stands for targets, of which there are K
    hidden, weight, bias = head_arguments(hidden, weight, rows, bias)
    temperature, temperatures = temperature_arguments(temperature, rows)
    softcap, logit_scale = transform_arguments(softcap, logit_scale)
    carried, (softcap, logit_scale) = changing(softcap, logit_scale)
    logprobs, _ = _op(
        hidden,
        weight,
        ids.long(),
        row_temperatures(temperature, temperatures, hidden, stat_dtype(hidden, weight)),
        bias,
        softcap,
        logit_scale,
        choose_backend(backend, hidden),
        carried,
    )
    return logprobs
