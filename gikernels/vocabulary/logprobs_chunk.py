"""What the parts of `logprobs` share: where rows of logits lie, how they become final ones, and the
arithmetic of some rows (n, c): of the whole vocabulary, or of the tokens that each row kept."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gikernels.reference import stat_dtype, transform_logits

# For -inf, which would make 0 * log 0 a NaN: far below any logit, far from overflow.
LOWEST = -1e30


class Transform(NamedTuple):
    """From the given logits to the final ones: scale, softcap, temperature, in this order."""

    temperature: float | Tensor  # a number, or (N)
    softcap: float | None
    logit_scale: float

    def final(self, z: Tensor, rows: Tensor) -> Tensor:
        """Final logits of some rows' given ones."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[rows]
        elif self == (1.0, None, 1.0):
            return z
        return transform_logits(z, temperature, softcap=self.softcap, logit_scale=self.logit_scale)

    def scale_gradient_(self, dz: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """dz times d final / d given, where z are the final logits (n, c)."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[rows].to(dz.dtype).unsqueeze(1)
        if self.softcap is not None:  # tanh' = 1 - tanh^2
            dz *= 1 - (z * temperature / self.softcap).square()
        return dz.mul_(self.logit_scale).div_(temperature)


def row_view(logits: Tensor) -> Tensor:
    """(..., V) as (A, B, V), a view unless three strides lead: `logits[:, :-1]` is not copied."""
    *lead, vocab = logits.shape
    for k in range(len(lead) + 1):
        try:
            return logits.view(math.prod(lead[:k]), math.prod(lead[k:]), vocab)
        except RuntimeError:
            continue
    return logits.reshape(1, -1, vocab)


def stats_of_(
    z: Tensor,  # (n, c) final logits; overwritten
    ref_z: Tensor | None,  # (n, c) overwritten
    targets: Tensor,  # (n) columns
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """logprobs, entropy, kl, and norms (n, 2 or 4): peak, log total, ref_peak, cross / total."""
    top = z.amax(1, keepdim=True)
    z -= top
    target_z = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    e = z.clamp_(min=LOWEST).exp()
    s = e.sum(1)
    log_s = s.log()
    norms, kl = [top.squeeze(1), log_s], None
    if ref_z is not None:
        ref_top = ref_z.amax(1, keepdim=True)
        ref_z -= ref_top
        log_q = ref_z.exp().sum(1).log()
        mean = torch.sub(z, ref_z, out=ref_z).masked_fill_(e == 0, 0).mul_(e).sum(1) / s
        norms += [ref_top.squeeze(1), mean]
        kl = mean - log_s + log_q
    entropy = log_s - e.mul_(z).sum(1) / s
    return target_z - log_s, entropy, kl, torch.stack(norms, 1)


def dlogits_of(
    z: Tensor,  # (n, c) final logits
    ref_z: Tensor | None,  # (n, c) overwritten
    targets: Tensor,  # (n) columns
    g: Tensor,  # (n) gradients of logprobs, entropy and kl
    h: Tensor,
    k: Tensor,
    entropy: Tensor,  # (n), as norms from the forward
    norms: Tensor,
) -> Tensor:
    """The gradient of the final logits (n, c)."""
    g, h, k, entropy = (x.unsqueeze(1) for x in (g, h, k, entropy))
    below = z - norms[:, :1]
    logp = torch.sub(below, norms[:, 1:2]).clamp_(min=LOWEST)
    p = logp.exp()
    inner = logp.mul_(h).add_(g + h * entropy)
    if ref_z is not None:
        from_mean = below.sub_(ref_z.sub_(norms[:, 2:3])).sub_(norms[:, 3:])
        inner -= from_mean.masked_fill_(p == 0, 0).mul_(k)
    dz = inner.mul_(p).neg_()
    return dz.scatter_add_(1, targets.unsqueeze(1), g)


def fake_outputs(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operations return while they are traced: logprobs, entropy, kl and norms."""
    n, dtype = targets.shape[0], stat_dtype(logits)
    has_ref = ref_logits is not None
    shapes = ((n,), (n,), (n if has_ref else 0,), (n, 4 if has_ref else 2))
    logprobs, entropy, kl, norms = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    return logprobs, entropy, kl, norms


def check_values(
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
