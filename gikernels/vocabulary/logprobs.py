"""`logprobs`: log-probability, entropy and exact KL of tokens whose logits one already has.

Read downward: the op in chunks of PyTorch, the custom op with its gradient, the public function.
The kernels are in logprobs_kernels.py, their launchers in logprobs_triton.py.

One pass over the logits. With u = z - peak the final logits below their row's maximum, and ref_u
the same of the reference, the sums

    total = sum exp(u)                  weighted = sum exp(u) u
    ref_total = sum exp(ref_u)          cross    = sum exp(u) (u - ref_u)

give  logprob = u_y - log total,  entropy = log total - weighted / total,
      kl = cross / total - log total + log ref_total.

Every logit meets its maximum before it meets a sum, so an offset of 1e4 that a row shares costs no
digits. The backward keeps peak and log total apart for the same reason. With g, h, k the gradients
of the three results, and log p_j - log q_j - kl = u_j - ref_u_j - cross / total,

    dz_j = g [j = y] - p_j (g + h (log p_j + entropy) - k (u_j - ref_u_j - cross / total)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.settings import workspace_for
from gikernels.backends.symbols import changing, settled
from gikernels.reference import Support, TokenStats, stat_dtype
from gikernels.vocabulary.head import Kept
from gikernels.vocabulary.logprobs_chunk import (
    Transform,
    check_values,
    dlogits_of,
    fake_outputs,
    row_view,
    stats_of_,
)
from gikernels.vocabulary.logprobs_support import kept_logprobs
from gikernels.vocabulary.support import support_arguments

BACKENDS = ("triton", "reference")


def _choose(backend: str, logits: Tensor) -> str:
    """fp64 is for gradcheck, so that "auto" takes what is exact: tanh in a kernel is fp32's."""
    exact = logits.dtype == torch.float64
    return dispatch.choose(backend, logits, BACKENDS[::-1] if exact else BACKENDS)


# --- in chunks of PyTorch -----------------------------------------------------------------------


def _chunks(rows: Tensor, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """So many rows at once that ten buffers, all that is ever alive, fit in the workspace.

    On a CPU they also stay in the cache: at 2048 x 32768, chunks of 16 MiB took twice as long.
    """
    buffer = workspace_for(rows.device) // 10
    return rows.split(max(1, buffer // (vocab * dtype.itemsize))) if len(rows) else ()


def _final(x: Tensor, rows: Tensor, how: Transform, dtype: torch.dtype) -> Tensor:
    """Final logits (n, V) of some rows of x (A, B, V), in a buffer of their own."""
    # index_select is three times as fast as indexing, where there is one index.
    whole = x[0].index_select(0, rows) if len(x) == 1 else x[rows // x.shape[1], rows % x.shape[1]]
    z = whole.to(dtype)
    return how.final(z, rows)


def _forward_in_chunks(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None, how: Transform, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, vocab = stat_dtype(logits), logits.shape[-1]
    x, ref_x = row_view(logits), None if ref_logits is None else row_view(ref_logits)
    logprobs, entropy = (logits.new_zeros(len(targets), dtype=dtype) for _ in range(2))
    kl = logits.new_zeros(0 if ref_x is None else len(targets), dtype=dtype)
    norms = logits.new_zeros(len(targets), 2 if ref_x is None else 4, dtype=dtype)
    kept = Kept(targets != ignore_index)
    targets = kept.pick(targets) if kept.blank else targets
    for rows in _chunks(kept.rows, vocab, dtype):
        z = _final(x, rows, how, dtype)
        u = None if ref_x is None else _final(ref_x, rows, how, dtype)
        logprobs[rows], entropy[rows], kls, norms[rows] = stats_of_(z, u, targets[rows])
        if kls is not None:
            kl[rows] = kls
    for out in (logprobs, entropy, *(() if ref_x is None else (kl,))):
        kept.clear_(out)
    return logprobs, entropy, kl, norms


def _backward_in_chunks(
    grads: tuple[Tensor, Tensor, Tensor],  # of logprobs, entropy and kl, (N) each
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    saved: tuple[Tensor, Tensor],  # entropy, norms
    how: Transform,
    ignore_index: int,
) -> Tensor:
    dtype, vocab = stat_dtype(logits), logits.shape[-1]
    x, ref_x = row_view(logits), None if ref_logits is None else row_view(ref_logits)
    dlogits = torch.zeros(len(targets), vocab, dtype=logits.dtype, device=logits.device)
    wanted = Kept((targets != ignore_index) & (torch.stack(grads) != 0).any(0))
    targets = wanted.pick(targets) if wanted.blank else targets
    for rows in _chunks(wanted.rows, vocab, dtype):
        z = _final(x, rows, how, dtype)
        u = None if ref_x is None else _final(ref_x, rows, how, dtype)
        some = [t[rows] for t in (*grads, *saved)]
        dz = how.scale_gradient_(dlogits_of(z, u, targets[rows], *some), z, rows)
        dlogits.index_copy_(0, rows, dz.to(logits.dtype))
    return wanted.clear_(dlogits).view(logits.shape)


# --- the custom op and its gradient -------------------------------------------------------------


@torch.library.custom_op("gikernels::logprobs", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS)
def _op(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (N) int64
    ref_logits: Tensor | None,  # (..., V)
    temperatures: Tensor | None,  # (N), in place of the number
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str,  # "reference" or "triton", as dispatch.choose returned it
    carried: Tensor | None = None,  # the three numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (N), entropy (N), kl (N) or (0), and for the backward, of no use to anyone else:

    (N, 2) or (N, 4) of peak, log total, ref_peak, cross / total.
    """
    temperature, softcap, logit_scale = settled(carried, temperature, softcap, logit_scale)
    how = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    check_values(logits, targets, temperatures, ignore_index)
    if backend == "triton":
        from gikernels.vocabulary import logprobs_triton

        return logprobs_triton.forward(logits, targets, ref_logits, how, ignore_index)
    return _forward_in_chunks(logits, targets, ref_logits, how, ignore_index)


@_op.register_fake
def _(logits, targets, ref_logits, *_):
    return fake_outputs(logits, targets, ref_logits)


@torch.library.custom_op(
    "gikernels::logprobs_backward", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
def _backward_op(
    grad_logprobs: Tensor,  # (N)
    grad_entropy: Tensor,  # (N)
    grad_kl: Tensor,  # (N) or (0)
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (N)
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    entropy: Tensor,
    norms: Tensor,
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
    if ref_logits is None:
        grad_kl = torch.zeros_like(entropy)
    grads, saved = (grad_logprobs, grad_entropy, grad_kl), (entropy, norms)
    if backend == "triton":
        from gikernels.vocabulary import logprobs_triton

        return logprobs_triton.backward(
            grads, logits, targets, ref_logits, saved, how, ignore_index
        )
    return _backward_in_chunks(grads, logits, targets, ref_logits, saved, how, ignore_index)


@_backward_op.register_fake
def _(grad_logprobs, grad_entropy, grad_kl, logits, *others):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ref_logits, temperatures, *ctx.options, carried = inputs
    _, entropy, _, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(logits, targets, ref_logits, temperatures, entropy, norms, carried)


def _backward(ctx, grad_logprobs, grad_entropy, grad_kl, _):
    *saved, carried = ctx.saved_tensors
    dlogits = _backward_op(grad_logprobs, grad_entropy, grad_kl, *saved, *ctx.options, carried)
    return dlogits, *[None] * 9


_op.register_autograd(_backward, setup_context=_setup_context)


# --- the public function ------------------------------------------------------------------------


def logprobs(
    logits: Tensor,  # (..., V) float
    targets: Tensor,  # (...) int
    temperature: float | Tensor = 1.0,  # a number, (), or (...)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logits: Tensor | None = None,  # (..., V) float
    ignore_index: int = -100,
    support: Support | None = None,  # of the rows in order
    backend: str = "auto",
) -> TokenStats:
    """Token log-probabilities, entropy and exact KL to a reference, in one read of the logits.

        z = softcap * tanh(logit_scale * logits / softcap) / temperature
        logp, p = z.log_softmax(-1), z.softmax(-1)
        logprobs = logp.gather(-1, targets[..., None])[..., 0]
        entropy = -(p * logp).sum(-1)
        kl = (p * (logp - ref_z.log_softmax(-1))).sum(-1)      # None without ref_logits

    in fp32 whatever the dtype of the logits (fp64 stays fp64), without a second (..., V) tensor but
    the gradient of the logits. `ref_logits` go through the same transform and get no gradient, nor
    does `temperature`. Rows whose target is `ignore_index` give 0 and a zero gradient, whatever
    lies there. A logit of -inf is a token that cannot be drawn.

    With `support`, logp and the reference's are renormalised over the tokens that a row could be
    sampled from, at the cost of those, by PyTorch on every backend. A target that is none of them
    gives -inf, and its log-probability no gradient.
    """
    checks.floats("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise checks.wrong("logits", logits, "shape (..., V) with V >= 1")
    checks.backward_only(logits=logits)
    checks.rows_of_one_rank(logits=logits, targets=targets, ref_logits=ref_logits)
    checks.shape("targets", checks.ints("targets", targets), logits.shape[:-1], "logits without V")
    temperatures = None
    if isinstance(temperature, Tensor):
        checks.floats("temperature", temperature)
        if temperature.dim() > 0:
            checks.shape("temperature", temperature, tuple(targets.shape), "that of targets, or ()")
        temperatures = temperature.detach().expand(targets.shape).reshape(-1)
        temperature = 1.0
    checks.number("temperature", temperature, above=0)
    if softcap is not None:
        checks.number("softcap", softcap, above=0)
    checks.number("logit_scale", logit_scale)
    if ref_logits is not None:
        checks.shape(
            "ref_logits", checks.floats("ref_logits", ref_logits), tuple(logits.shape), "as logits"
        )
        ref_logits = ref_logits.detach()
    checks.whole("ignore_index", ignore_index, at_least=-(2**63))
    checks.same_device(
        logits=logits, targets=targets, ref_logits=ref_logits, temperature=temperatures
    )
    softcap = None if softcap is None else float(softcap)
    carried, numbers = changing(float(temperature), softcap, float(logit_scale))
    arguments = (
        logits,
        targets.reshape(-1).long(),
        ref_logits,
        temperatures,
        *numbers,
        ignore_index,
        _choose(backend, logits),
    )
    offsets, ids = support_arguments(support, targets)
    if offsets is None:
        logprob, entropy, kl, _ = _op(*arguments, carried)
    else:
        logprob, entropy, kl, _ = kept_logprobs(*arguments, offsets, ids, carried)
    return TokenStats(
        logprob.view(targets.shape),
        entropy.view(targets.shape),
        None if ref_logits is None else kl.view(targets.shape),
    )
