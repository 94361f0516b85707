"""The divergence of two heads over the whole vocabulary, with its gradients formed on the way.

With p the policy's probabilities, q the reference's, and m = mix p + (1 - mix) q,

    reverse   KL(p, q) = sum p (log p - log q)         dz = p (log p - log q - KL(p, q))
    forward   KL(q, p)                                 dz = p - q
    jsd       mix KL(p, m) + (1 - mix) KL(q, m)        dz = mix p (log p - log m - KL(p, m))

All need both log-sum-exps before the first term, jsd its KL before the first gradient. So a chunk
of rows whose logits, both of them, fit into the workspace gives one after the other: sums, terms,
dZ, products. That is 2 + 2 products of N D V, and none again in the backward, which only
multiplies, as the loss is a scalar (formed.py).

Read downward: chunked PyTorch, custom operation, public function. The Triton half is
divergence_triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.settings import workspace_for
from gikernels.backends.symbols import changing, settled
from gikernels.reference import LossOut, stat_dtype
from gikernels.vocabulary import formed
from gikernels.vocabulary.formed import denominators
from gikernels.vocabulary.head import (
    FLOOR,
    Head,
    Kept,
    choose_backend,
    full_precision,
    head_arguments,
    reference_arguments,
    spans,
    temperature_arguments,
    transform_arguments,
    weighted_rows,
)
from gikernels.vocabulary.totals import Pair, merge_totals, row_temperatures, tile_total

KINDS = ("reverse", "forward", "jsd")

# --- chunked PyTorch ----------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Some columns of a chunk of rows, (n, c) each."""

    cols: slice
    z: Tensor  # the policy's logits, then what `terms_` leaves
    ref_z: Tensor
    slope: Tensor | None  # of the softcap


def _chunked(
    pair: Pair, kind: str, mix: float, wanted: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Divergences (n), and the gradients of hidden, weight and bias."""
    (n, _), v, dtype = pair.x.shape, len(pair.head.weight), pair.temperature.dtype
    capped = pair.head.softcap is not None
    wide = min(v, max(1024, v // 8))
    spare_count = 3 if kind == "jsd" else 1
    each = (3 if capped else 2) * v + spare_count * wide
    tall = min(max(n, 1), max(1, workspace_for(pair.x.device) // dtype.itemsize // each))
    # One chunk gives each element of dW in one product, which can be rounded at once.
    weight = pair.head.weight
    dw_dtype = formed.saved_dtype(weight) if tall >= n else dtype
    shapes = (pair.x.shape, weight.shape, weight.shape[:1])
    sums = [
        pair.x.new_zeros(shape, dtype=d) if yes else None
        for shape, d, yes in zip(shapes, (dtype, dw_dtype, dtype), wanted)
    ]
    memory = pair.x.new_empty(3 if capped else 2, tall * v, dtype=dtype)
    spare = pair.x.new_empty(spare_count, tall * wide, dtype=dtype)
    out = pair.x.new_empty(n, dtype=dtype)
    for rows in spans(n, tall):
        some = pair.rows(rows)
        chunks = _logits(some, memory, spare[0], wide)
        found = [
            terms_(kind, mix, c.z, c.ref_z, [s[: c.z.numel()].view_as(c.z) for s in spare])
            for c in chunks
        ]
        out[rows], own = torch.stack(found).sum(0)
        if any(wanted):
            _add_gradients(some, kind, mix, own, chunks, sums, rows)
    return out, sums


def _logits(pair: Pair, memory: Tensor, spare: Tensor, wide: int) -> list[Chunk]:
    """Log-probabilities of all columns, a block of them after the other."""
    n, dtype = len(pair.x), pair.temperature.dtype
    x, ref_x, temperature = pair.x.to(dtype), pair.ref_x.to(dtype), pair.temperature
    outer = pair.head.outer(temperature)
    nothing = torch.stack([torch.full_like(temperature, -torch.inf), torch.zeros_like(temperature)])
    sums, chunks = [nothing, nothing], []
    for cols in spans(len(pair.head.weight), wide):
        # Each block is contiguous, for the sake of the products.
        tiles = [m[n * cols.start : n * cols.stop].view(n, -1) for m in memory]
        pair.head.columns(cols, dtype).logits(x, temperature, tiles[0])
        pair.ref_head.columns(cols, dtype).logits(ref_x, temperature, tiles[1])
        for i in (0, 1):
            here = tile_total(tiles[i], spare[: tiles[i].numel()].view_as(tiles[i]))
            sums[i] = merge_totals(sums[i], here)
        slope = None
        if outer is not None:
            slope = torch.div(tiles[0], outer, out=tiles[2]).square_().neg_().add_(1)
        chunks.append(Chunk(cols, tiles[0], tiles[1], slope))
    for chunk in chunks:
        for tile, (peak, total) in zip((chunk.z, chunk.ref_z), sums):
            # One after the other: their sum would round at a large offset.
            tile.sub_(peak.unsqueeze(1)).sub_(total.log().unsqueeze(1)).clamp_(min=FLOOR)
    return chunks


def terms_(kind: str, mix: float, log_p: Tensor, log_q: Tensor, spare: list[Tensor]) -> Tensor:
    """(2, n): the divergence's terms in this chunk, and those of the KL that dZ subtracts. Leaves p
    in log_p; in log_q what p is multiplied by in dZ, or q where kind is forward."""
    if kind == "reverse":
        p = torch.exp(log_p, out=spare[0])
        torch.sub(log_p, log_q, out=log_q)
        log_p.copy_(p)
        own = p.mul_(log_q).sum(1)
        return torch.stack([own, own])
    if kind == "forward":
        apart = torch.sub(log_q, log_p, out=spare[0])
        q, _ = log_q.exp_(), log_p.exp_()
        # A token that the reference draws and the policy cannot: infinite. FLOOR is no logarithm.
        apart.masked_fill_((apart > -0.5 * FLOOR) & (q > 0), torch.inf)
        value = apart.mul_(q).sum(1)
        return torch.stack([value, torch.zeros_like(value)])
    p, q = torch.exp(log_p, out=spare[0]), torch.exp(log_q, out=spare[1])
    log_m = torch.mul(p, mix, out=spare[2]).add_(q, alpha=1 - mix)
    log_m.clamp_(min=torch.finfo(log_m.dtype).tiny).log_()
    theirs = q.mul_(log_q.sub_(log_m)).sum(1)
    torch.sub(log_p, log_m, out=log_q)
    own = torch.mul(p, log_q, out=log_m).sum(1)
    log_p.copy_(p)
    return torch.stack([mix * own + (1 - mix) * theirs, own])


def _add_gradients(
    pair: Pair,
    kind: str,
    mix: float,
    own: Tensor,  # (n) KL that dZ subtracts
    chunks: list[Chunk],
    sums: list[Tensor | None],
    rows: slice,  # where the chunk of rows lies in sums[0]
) -> None:
    all_dx, dw, db = sums
    back = pair.factor * pair.head.logit_scale / pair.temperature
    back = back * mix if kind == "jsd" else back
    scaled = pair.x.to(own.dtype) * back.unsqueeze(1)
    dx = None if all_dx is None else all_dx[rows]
    for cols, p, other, slope in chunks:
        if kind == "forward":
            dz = other.neg_().add_(p)
        else:
            dz = other.sub_(own.unsqueeze(1)).mul_(p)
        if slope is not None:
            dz.mul_(slope)
        if dx is not None:
            dx.addmm_(dz, pair.head.weight[cols].to(dz.dtype))
        if dw is not None and dw.dtype == dz.dtype:
            dw[cols].addmm_(dz.T, scaled)
        elif dw is not None:  # the only chunk
            dw[cols] = dz.T @ scaled
        if db is not None:
            db[cols] += weighted_rows(dz, back, dz)
    if dx is not None:
        dx.mul_(back.unsqueeze(1))


# --- custom operation ---------------------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::linear_divergence", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, D')
    ref_weight: Tensor,  # (V, D')
    mask: Tensor,  # (N)
    denom: Tensor,  # ()
    weights: Tensor | None,  # (N): row i is divided by denom / weights[i]
    temperatures: Tensor,  # (N) in the precision of the statistics
    bias: Tensor | None,  # (V)
    softcap: float | None,
    logit_scale: float,
    kind: str,
    mix: float,
    backend: str,
    wanted: list[bool],  # gradients of hidden, weight, bias
    carried: Tensor | None = None,  # the numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), and its gradients, empty where they are not wanted."""
    softcap, logit_scale, mix = settled(carried, softcap, logit_scale, mix)
    dtype, kept = temperatures.dtype, Kept(mask)
    temperature = kept.pick(temperatures, 1)
    if hidden.device.type == "cpu" and (temperature <= 0).any():
        raise checks.wrong("temperature", temperature.min().item(), "numbers > 0")
    each = torch.ones_like(temperature) if weights is None else kept.pick(weights).to(dtype)
    if kept.blank:
        each = each.where(mask, 0)
    pair = Pair(
        kept.pick(hidden),
        Head(weight, bias, softcap, logit_scale),
        kept.pick(ref_hidden),
        Head(ref_weight, None, softcap, logit_scale),
        temperature,
        each * formed.scale_of(hidden, denom),
    )
    if backend == "triton":
        from gikernels.vocabulary import divergence_triton

        found, (dx, dw, db) = divergence_triton.chunked(pair, kind, mix, wanted)
    else:
        found, (dx, dw, db) = _chunked(pair, kind, mix, wanted)
    if dx is not None and not kept.all:
        dx = torch.zeros(hidden.shape, dtype=dtype, device=dx.device).index_copy_(0, kept.rows, dx)
    blank = formed.blanks(hidden, weight, dtype, [False] * 3)
    gradients = [x if g is None else g.to(x.dtype) for g, x in zip((dx, dw, db), blank)]
    total = (found * each).where(each != 0, 0).sum() / denom
    return total, gradients[0], gradients[1], gradients[2]


@_op.register_fake
def _(
    hidden, weight, ref_hidden, ref_weight, mask, denom, weights, temperatures, bias, softcap,
    logit_scale, kind, mix, backend, wanted, carried=None,
):  # fmt: skip
    loss = hidden.new_empty((), dtype=temperatures.dtype)
    return loss, *formed.blanks(hidden, weight, temperatures.dtype, wanted)


formed.register(_op, formed.Places(denom=5, bias=8, backend=13, wanted=14, gradients=1))


# --- public -------------------------------------------------------------------------------------


def linear_divergence(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of the same dtype
    ref: tuple[Tensor, Tensor],  # (N, D'), (V, D'); no gradient, no bias
    *,
    kind: str = "reverse",  # or "forward", "jsd"
    mix: float = 0.5,  # of pi in the middle of "jsd"
    mask: Tensor,  # (N) bool
    denom: float | Tensor,  # the GLOBAL number of tokens, a number or (); or (N): each row's own
    temperature: float | Tensor = 1.0,  # a number, or (N); of both; no gradient
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",  # "triton" or "reference"
) -> LossOut:
    """How far a policy is from a reference over the whole vocabulary, without the logits:

        log_p, log_q = z.log_softmax(-1), ref_z.log_softmax(-1)     z as in linear_logprobs
        log_m = (mix * log_p.exp() + (1 - mix) * log_q.exp()).log()
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1)           KL(pi, ref)
        forward = (log_q.exp() * (log_q - log_p)).sum(-1)           KL(ref, pi)
        jsd = mix * KL(pi, m) + (1 - mix) * KL(ref, m)
        loss = (divergence * mask).sum() / denom

    Gradients flow to hidden, weight and bias; they are formed in the forward, where one is wanted,
    and kept until the backward. Metrics: divergence, the same number without a gradient. Scratch
    memory: gikernels.backends.settings, and a dW in fp32 while chunks of rows are added up.
    """
    checks.dims("hidden", checks.floats("hidden", hidden), 2, "(N, D)")
    checks.shape("mask", checks.bools("mask", mask), (hidden.shape[0],), "one for each row")
    checks.same_device(hidden=hidden, mask=mask)
    hidden, weight, bias = head_arguments(hidden, weight, mask.int(), bias)
    if ref is None:
        raise checks.wrong("ref", ref, "a pair (ref_hidden, ref_weight)")
    ref_hidden, ref_weight = reference_arguments(ref, hidden, weight)
    checks.one_of("kind", kind, KINDS)
    checks.number("mix", mix, above=0, below=1)
    temperature, temperatures = temperature_arguments(temperature, mask)
    softcap, logit_scale = transform_arguments(softcap, logit_scale)
    dtype = stat_dtype(hidden, weight)
    denom, weights = denominators(checks.denominator(denom, mask), mask, dtype)
    carried, (softcap, logit_scale, mix) = changing(softcap, logit_scale, float(mix))
    grad = torch.is_grad_enabled()
    loss, *_ = _op(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        mask,
        denom,
        weights,
        row_temperatures(temperature, temperatures, hidden, dtype),
        bias,
        softcap,
        logit_scale,
        kind,
        mix,
        choose_backend(backend, hidden),
        [x is not None and grad and x.requires_grad for x in (hidden, weight, bias)],
        carried,
    )
    return LossOut(loss, {"divergence": loss.detach()})
