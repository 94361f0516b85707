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
from gikernels.reference import TokenStats, stat_dtype, transform_logits
from gikernels.vocabulary.head import Kept
from gikernels.vocabulary.logprobs_transform import Transform, row_view

BACKENDS = ("triton", "reference")


def _choose(backend: str, logits: Tensor) -> str:
    """fp64 is for gradcheck, so that "auto" takes what is exact: tanh in a kernel is fp32's."""
    exact = logits.dtype == torch.float64
    return dispatch.choose(backend, logits, BACKENDS[::-1] if exact else BACKENDS)


# --- in chunks of PyTorch -----------------------------------------------------------------------

# For -inf, which would make 0 * log 0 a NaN: far below any logit, far from overflow.
LOWEST = -1e30


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
    temperature = how.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature[rows]
    elif how == (1.0, None, 1.0):
        return z
    return transform_logits(z, temperature, softcap=how.softcap, logit_scale=how.logit_scale)


def _scale_gradient_(dz: Tensor, z: Tensor, rows: Tensor, how: Transform) -> Tensor:
    """dz times d final / d given, where z are the final logits (n, V)."""
    temperature = how.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature[rows].to(dz.dtype).unsqueeze(1)
    if how.softcap is not None:  # tanh' = 1 - tanh^2
        dz *= 1 - (z * temperature / how.softcap).square()
    return dz.mul_(how.logit_scale).div_(temperature)


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
        top = z.amax(1, keepdim=True)
        z -= top
        logprobs[rows] = z.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        e = z.clamp_(min=LOWEST).exp()
        s = e.sum(1)
        log_s = s.log()
        norms[rows, 0], norms[rows, 1] = top.squeeze(1), log_s
        logprobs[rows] -= log_s
        if ref_x is not None:
            u = _final(ref_x, rows, how, dtype)
            ref_top = u.amax(1, keepdim=True)
            u -= ref_top
            log_q = u.exp().sum(1).log()
            mean = torch.sub(z, u, out=u).masked_fill_(e == 0, 0).mul_(e).sum(1) / s
            norms[rows, 2], norms[rows, 3] = ref_top.squeeze(1), mean
            kl[rows] = mean - log_s + log_q
        entropy[rows] = log_s - e.mul_(z).sum(1) / s
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
        g, h, k = (grad[rows].unsqueeze(1) for grad in grads)
        entropy, norms = (t[rows].unsqueeze(-1) for t in saved)
        z = _final(x, rows, how, dtype)
        below = z - norms[:, 0]
        logp = torch.sub(below, norms[:, 1]).clamp_(min=LOWEST)
        p = logp.exp()
        inner = logp.mul_(h).add_(g + h * entropy)
        if ref_x is not None:
            ref_below = _final(ref_x, rows, how, dtype).sub_(norms[:, 2])
            from_mean = below.sub_(ref_below).sub_(norms[:, 3]).masked_fill_(p == 0, 0)
            inner -= from_mean.mul_(k)
        dz = inner.mul_(p).neg_()
        dz.scatter_add_(1, targets[rows].unsqueeze(1), g)
        dlogits.index_copy_(0, rows, _scale_gradient_(dz, z, rows, how).to(logits.dtype))
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
    _check_values(logits, targets, temperatures, ignore_index)
    if backend == "triton":
        from gikernels.vocabulary import logprobs_triton

        return logprobs_triton.forward(logits, targets, ref_logits, how, ignore_index)
    return _forward_in_chunks(logits, targets, ref_logits, how, ignore_index)


def _check_values(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, ignore_index: int
) -> None:
    """On the CPU only: on a GPU it would wait for the device, and the kernel answers with NaN."""
    if logits.device.type != "cpu":
        return
    kept, vocab = targets != ignore_index, logits.shape[-1]
    outside = targets[kept & ((targets < 0) | (targets >= vocab))]
    if len(outside):
        raise ValueError(
            f"targets: got {outside[0].item()}, want 0 <= target < {vocab}, or {ignore_index} for "
            "a row to ignore"
        )
    if temperatures is not None and not (temperatures[kept] > 0).all():
        raise ValueError(
            f"temperature: got {temperatures[kept].min().item()} among its values, want all > 0"
        )


@_op.register_fake
def _(
    logits,
    targets,
    ref_logits,
    temperatures,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    backend,
    carried=None,
):
    n, dtype = targets.shape[0], stat_dtype(logits)
    has_ref = ref_logits is not None
    shapes = ((n,), (n,), (n if has_ref else 0,), (n, 4 if has_ref else 2))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


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
    """
    checks.floats("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise checks.wrong("logits", logits, "shape (..., V) with V >= 1")
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
    logprob, entropy, kl, _ = _op(
        logits,
        targets.reshape(-1).long(),
        ref_logits,
        temperatures,
        *numbers,
        ignore_index,
        _choose(backend, logits),
        carried,
    )
    return TokenStats(
        logprob.view(targets.shape),
        entropy.view(targets.shape),
        None if ref_logits is None else kl.view(targets.shape),
    )
