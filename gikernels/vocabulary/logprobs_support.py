"""`logprobs` of rows that could only be sampled from some tokens, at the cost of those.

The kept logits of some rows are picked, (n, K), -inf where a row has fewer, and are a chunk as any
other (logprobs_chunk.py). Rows without a support go through gikernels::logprobs. The gradient of
the logits is the only tensor of their size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gikernels.backends import dispatch
from gikernels.backends.settings import workspace_for
from gikernels.backends.symbols import settled
from gikernels.reference import stat_dtype
from gikernels.vocabulary import support
from gikernels.vocabulary.logprobs_chunk import (
    Transform,
    check_values,
    dlogits_of,
    fake_outputs,
    row_view,
    stats_of_,
)

IGNORED = -100


def _picked(logits: Tensor, chunk: support.Chunk, how: Transform, dtype: torch.dtype) -> Tensor:
    """Final logits (n, K) of the kept tokens."""
    x = row_view(logits)
    rows = chunk.rows.unsqueeze(1)
    z = x[rows // x.shape[1], rows % x.shape[1], chunk.ids].to(dtype)
    return how.final(z, chunk.rows).masked_fill_(chunk.pad, -torch.inf)


def _chunks(
    offsets: Tensor, ids: Tensor, which: Tensor, dtype: torch.dtype
) -> Iterator[support.Chunk]:
    return support.chunks(
        support.Sets(offsets, ids),
        which.nonzero().squeeze(1),
        lambda kept: 2 * kept * support.id_bytes(dtype),
        workspace_for(which.device),
    )


# --- the custom op and its gradient -------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::logprobs_support", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
def kept_logprobs(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (N) int64
    ref_logits: Tensor | None,  # (..., V)
    temperatures: Tensor | None,  # (N), in place of the number
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str,
    offsets: Tensor,  # (N + 1)
    ids: Tensor,
    carried: Tensor | None = None,  # the three numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As gikernels::logprobs."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    support.refuse_capture(logits)
    check_values(logits, targets, temperatures, ignore_index)
    support.check_support(offsets, ids, logits.shape[-1])
    how = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    dtype, kept = stat_dtype(logits), targets != ignore_index
    rest = kept & (offsets.diff() == 0)
    outputs = torch.ops.gikernels.logprobs(
        logits, targets.where(rest, IGNORED), ref_logits, temperatures, temperature, softcap,
        logit_scale, IGNORED, backend,
    )  # fmt: skip
    logprobs, entropy, kl, norms = outputs
    for chunk in _chunks(offsets, ids, kept & ~rest, dtype):
        z = _picked(logits, chunk, how, dtype)
        ref_z = None if ref_logits is None else _picked(ref_logits, chunk, how, dtype)
        column = chunk.columns(targets)
        found = column < z.shape[1]
        logprob, entropies, kls, some = stats_of_(z, ref_z, column.where(found, 0))
        logprobs[chunk.rows] = logprob.where(found, -torch.inf)
        entropy[chunk.rows], norms[chunk.rows] = entropies, some
        if kls is not None:
            kl[chunk.rows] = kls
    return outputs


@kept_logprobs.register_fake
def _(logits, targets, ref_logits, *_):
    return fake_outputs(logits, targets, ref_logits)


@torch.library.custom_op(
    "gikernels::logprobs_support_backward", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
def _backward_op(
    grad_logprobs: Tensor,  # (N)
    grad_entropy: Tensor,  # (N)
    grad_kl: Tensor,  # (N) or (0)
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (N)
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    norms: Tensor,
    offsets: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str,
    carried: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits, contiguous (..., V)."""
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    how = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    dtype, kept = stat_dtype(logits), targets != ignore_index
    rest = kept & (offsets.diff() == 0)
    dlogits = torch.ops.gikernels.logprobs_backward(
        grad_logprobs, grad_entropy, grad_kl, logits, targets.where(rest, IGNORED), ref_logits,
        temperatures, entropy, norms, temperature, softcap, logit_scale, IGNORED, backend,
    )  # fmt: skip
    flat, vocab = dlogits.view(-1), logits.shape[-1]
    if ref_logits is None:
        grad_kl = torch.zeros_like(entropy)
    # A target that was not kept has no log-probability to change.
    grads = (grad_logprobs.masked_fill(logprobs == -torch.inf, 0), grad_entropy, grad_kl)
    alive = torch.stack([g != 0 for g in grads]).any(0) & kept & ~rest
    for chunk in _chunks(offsets, ids, alive, dtype):
        z = _picked(logits, chunk, how, dtype)
        ref_z = None if ref_logits is None else _picked(ref_logits, chunk, how, dtype)
        column = chunk.columns(targets)
        column = column.where(column < z.shape[1], 0)  # its gradient is 0
        some = [t[chunk.rows] for t in (*grads, entropy, norms)]
        dz = dlogits_of(z, ref_z, column, *some)
        # The slope of a softcap is infinite at the logits of padding.
        dz = how.scale_gradient_(dz, z, chunk.rows).masked_fill_(chunk.pad, 0).to(logits.dtype)
        at = chunk.rows.unsqueeze(1) * vocab + chunk.ids
        flat.scatter_add_(0, at.view(-1), dz.view(-1))  # where padded, 0
    return dlogits


@_backward_op.register_fake
def _(grad_logprobs, grad_entropy, grad_kl, logits, *others):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ref_logits, temperatures, *ctx.options, offsets, ids, carried = inputs
    logprobs, entropy, _, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(
        logits, targets, ref_logits, temperatures, logprobs, entropy, norms, offsets, ids, carried
    )


def _backward(ctx, grad_logprobs, grad_entropy, grad_kl, _):
    *saved, carried = ctx.saved_tensors
    dlogits = _backward_op(grad_logprobs, grad_entropy, grad_kl, *saved, *ctx.options, carried)
    return dlogits, *[None] * 11


kept_logprobs.register_autograd(_backward, setup_context=_setup_context)
