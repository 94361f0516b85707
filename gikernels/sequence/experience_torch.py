"""The PyTorch half of experience.py, backend "reference": in chunks, on any device.

On a CPU the time goes into passes over memory and into where(), which costs ten additions (0.39
against 0.03 ms for 512 x 512 on one core). A bitwise AND with all ones or all zeros masks as
safely, NaN included, at the price of an addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gikernels.reference import Experience, Gae, kl_estimate

# Tokens at a time. 512 x 512 took 2.6, 2.1 and 3.1 ms with 1 << 16, 17 and 18 on a busy machine:
# less costs calls, more makes malloc give memory back and the kernel clear it again.
CHUNK = 1 << 17


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """All ones where mask is True, as integers as wide as dtype."""
    wide = torch.int64 if dtype == torch.float64 else torch.int32
    return mask.view(torch.int8).neg().to(wide)


def _keep(x: Tensor, bits: Tensor) -> Tensor:
    return (x.view(bits.dtype) & bits).view(x.dtype)


def _keep_(x: Tensor, bits: Tensor) -> Tensor:
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def _keep_into(out: Tensor, x: Tensor, bits: Tensor) -> Tensor:
    torch.bitwise_and(x.to(out.dtype).view(bits.dtype), bits, out=out.view(bits.dtype))
    return out


def _last(bits: Tensor, steps: Tensor) -> Tensor:
    """(S, 1), the last unmasked step; 0 where there is none."""
    return (bits & steps).amax(1, keepdim=True).long()


def _scan(
    rewards: Tensor,  # (S, T), zero where masked
    values: Tensor,  # (S, T), zero where masked
    bits: Tensor,  # (S, T)
    last: Tensor,  # (S, 1), the last unmasked step
    last_values: Tensor | None,  # (S, 1), the value after it
    gamma: float,
    lam: float,
    *,
    out: Tensor,  # (S, T)
) -> Tensor:
    """Advantages, zero where masked, from two matrix products for each block of steps.

    With c = gamma lam, R the lambda-returns and n the next unmasked step,

        R_t = r_t + c w_n        w_t = R_t + (gamma / c - 1) V_t = b_t + c w_n

    so w is a sum of b with powers of c, counted in unmasked steps. Within a block, e_t = c^(number
    of unmasked steps before t) turns it into a triangular sum of e b, divided by e. Every term has
    a factor e_u / e_t <= 1, and blocks are short enough that e never underflows. Values are taken
    relative to their sequence's mean, so an offset of 1e6 costs no digits.
    """
    s, t = rewards.shape
    c = max(gamma * lam, 1e-15)  # 0 would be 0 / 0; 1e-15 of a neighbour is below any precision
    block = 16 if c >= 1 else max(1, min(16, int(-20 / math.log10(c))))
    blocks = -(-t // block)
    mask = bits.to(rewards.dtype)  # -1 where True, as the integer is
    centre = values.sum(1, keepdim=True) / mask.sum(1, keepdim=True).neg_().clamp_(min=1)
    values = _keep_(values - centre, bits)
    rewards = rewards.clone() if gamma == 1 else _keep_(rewards - (1 - gamma) * centre, bits)
    # What comes after the end joins the last reward at once, where a common offset cancels.
    beyond = -centre if last_values is None else last_values - centre
    rewards.scatter_add_(1, last, _keep(gamma * beyond, bits.gather(1, last)))
    b = torch.add(rewards, values, alpha=gamma / c - 1)
    if t % block:
        b, mask = (torch.nn.functional.pad(x, (0, -t % block)) for x in (b, mask))
    b, mask = b.view(-1, block), mask.view(-1, block)
    later = torch.ones(block, block, dtype=b.dtype, device=b.device).tril_(-1)  # [u, t]: u > t
    exponent = mask @ (later.T * -math.log2(c))
    decays = torch.exp2(exponent[:, -1] - mask[:, -1] * math.log2(c))
    e = exponent.exp2_()
    eb = b.mul_(e)
    after = eb @ later
    # Time first, so that the loop over blocks reads and writes whole rows.
    sums = (after[:, 0] + eb[:, 0]).view(s, blocks).T.contiguous()
    decays = decays.view(s, blocks).T.contiguous()
    w = torch.zeros(blocks + 1, s, dtype=b.dtype, device=b.device)  # at the start of each block
    following, *heads = w.unbind()[::-1]
    for head, total, decay in zip(heads, sums.unbind()[::-1], decays.unbind()[::-1]):
        following = torch.addcmul(total, decay, following, out=head)
    after.add_((w[1:] * decays).T.reshape(-1, 1)).div_(e)
    torch.sub(rewards, values, out=out)
    return _keep_(out.add_(after.view(s, -1)[:, :t]), bits)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
    out: Gae,
) -> None:
    dtype = out.advantages.dtype
    step = max(1, CHUNK // rewards.shape[1])
    steps = torch.arange(rewards.shape[1], dtype=torch.int32, device=rewards.device)
    for i in range(0, len(rewards), step):
        rows = slice(i, i + step)
        bits = _bits(mask[rows], dtype)
        reward, value = (_keep(x[rows].to(dtype), bits) for x in (rewards, values))
        last = _last(bits, steps)
        beyond = None if last_values is None else last_values[rows, None].to(dtype)
        advantages = _scan(reward, value, bits, last, beyond, gamma, lam, out=out.advantages[rows])
        torch.add(advantages, value, out=out.returns[rows])


def _chunks(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of sequences [a, b) that, padded to their longest, stay within CHUNK; that length."""
    a = longest = 0
    for i, length in enumerate(lengths):
        if i > a and max(longest, length) * (i + 1 - a) > CHUNK:
            yield a, i, longest
            a, longest = i, 0
        longest = max(longest, length)
    if len(lengths) > a:
        yield a, len(lengths), longest


def experience(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    kept: Tensor,
    kl_coefs: Tensor | None,
    kl_coef: float,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    exact_kl: Tensor | None,
    gamma: float,
    lam: float,
    estimator: str,
    norm: str,
    eps: float,
    apply_norm: bool,
    ignore_index: int,
    out: Experience,
) -> None:
    device, dtype = out.kl.device, out.kl.dtype
    mask = kept if kept.dtype == torch.bool else kept != ignore_index
    sequences = len(scores)
    starts = [0] * (sequences + 1) if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens is None:
        lengths = [logprobs.shape[1]] * sequences
    else:
        lengths = [b - a for a, b in pairwise(starts)]
    if kl_coefs is None:
        coefs = scores.new_full((sequences,), kl_coef, dtype=dtype)
    else:
        coefs = kl_coefs.to(dtype)
    scores = scores.to(dtype)
    steps = torch.arange(max(lengths, default=0), dtype=torch.int32, device=device)
    sums = torch.empty(4, sequences, dtype=torch.float64, device=device)

    for first, end, longest in _chunks(lengths):
        seqs = slice(first, end)
        rows = seqs if cu_seqlens is None else slice(starts[first], starts[end])
        within = None
        tokens = [x[rows] for x in out[:4]]
        if cu_seqlens is not None:  # pad this run of sequences
            within = steps[:longest] < torch.tensor(lengths[seqs], device=device).unsqueeze(1)
            tokens = [x.new_empty(within.shape) for x in tokens]
        rewards, kl, advantages, returns = tokens

        def take(x: Tensor, rows: slice = rows, within: Tensor | None = within) -> Tensor:
            if within is None:
                return x[rows]
            return x.new_zeros(within.shape).masked_scatter_(within, x[rows])

        bits = _bits(take(mask), dtype)
        if exact_kl is not None:
            _keep_into(kl, take(exact_kl), bits)
        else:
            torch.sub(take(logprobs).to(dtype), take(ref_logprobs).to(dtype), out=kl)
            _keep_(kl, bits)
            if estimator != "k1":
                kl.copy_(kl_estimate(kl, estimator))
        torch.sum(kl, 1, out=out.seq_kl[seqs])
        torch.mul(kl, -coefs[seqs, None], out=rewards)
        if kl_coefs is not None:
            _keep_(rewards, bits)  # a NaN coefficient times a masked zero
        if longest:
            last = _last(bits, steps[:longest])
            rewards.scatter_add_(1, last, _keep(scores[seqs, None], bits.gather(1, last)))
        if values is None:
            returns.copy_(rewards.sum(1, keepdim=True))
            advantages.copy_(_keep_(returns, bits))
        else:
            _keep_into(returns, take(values), bits)
            if longest:
                _scan(rewards, returns, bits, last, None, gamma, lam, out=advantages)
            returns.add_(advantages)
        if norm != "none":
            _row_sums(advantages, bits, out=sums[:, seqs])
        if within is not None:
            for flat, padded in zip(out[:4], tokens):
                flat[rows] = padded[within]

    if norm == "none":
        out.moments.zero_()
        return
    one_group = torch.zeros(sequences, dtype=torch.long, device=device)
    ids = one_group if group_ids is None else group_ids.long()
    moments = _merged(_row_moments(sums), ids, len(out.moments))
    out.moments.copy_(moments.T)
    if apply_norm:
        mean, scale = (x[ids] for x in _mean_and_scale(moments, eps))
        if cu_seqlens is not None:
            repeats = torch.tensor(lengths, device=device)
            mean, scale = (x.repeat_interleave(repeats) for x in (mean, scale))
        _normalize_rows_(out.advantages, mask, mean, scale)


def _row_sums(x: Tensor, bits: Tensor, *, out: Tensor) -> None:
    """Count, centre, and sums of deviations from it and of their squares; x zero where masked."""
    count = bits.sum(1, dtype=bits.dtype).neg_()
    centre = x.sum(1) / count.clamp(min=1)
    deviation = _keep_(x - centre.unsqueeze(1), bits)
    for row, sums in zip(
        out, (count, centre, deviation.sum(1), torch.linalg.vecdot(deviation, deviation))
    ):
        row.copy_(sums)


def _row_moments(sums: Tensor) -> Tensor:
    """Count, mean and M2 (3, S). The centre was rounded; the sum of deviations says by how much."""
    count, centre, rest, squares = sums
    mean_rest = rest / count.clamp(min=1)
    return torch.stack([count, centre + mean_rest, squares - rest * mean_rest])


def _merged(parts: Tensor, ids: Tensor, num_groups: int) -> Tensor:
    """Moments (3, G) of groups of the columns of parts (3, S): Chan for many at once."""
    count, mean, m2 = parts

    def by_group(x: Tensor) -> Tensor:
        return x.new_zeros(num_groups).index_add_(0, ids, x)

    total = by_group(count)
    merged = by_group(count * mean) / total.clamp(min=1)
    return torch.stack([total, merged, by_group(m2 + count * (mean - merged[ids]).square())])


def _mean_and_scale(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    count, mean, m2 = moments
    return mean, torch.rsqrt(m2 / count.clamp(min=1) + eps)


def _normalize_rows_(x: Tensor, mask: Tensor, mean: Tensor, scale: Tensor) -> None:
    """In place, for (S, T) with a mean a row or for (N) with one a token."""
    high = mean.to(x.dtype)
    low = (mean - high.double()).to(x.dtype)  # one fp32 near 1e6 has steps of 0.06
    rows = (len(x), *(1,) * (x.dim() - 1))
    high, low, scale = (y.to(x.dtype).view(rows) for y in (high, low, scale))
    step = max(1, CHUNK // max(1, math.prod(x.shape[1:])))
    for i in range(0, len(x), step):
        part = slice(i, i + step)
        y = x[part].sub_(high[part]).sub_(low[part]).mul_(scale[part])
        _keep_(y, _bits(mask[part], x.dtype))


def normalize(
    advantages: Tensor,
    mask: Tensor,
    moments: Tensor,
    group_ids: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    mean, scale = _mean_and_scale(moments.double().T, eps)
    one_group = torch.zeros(len(out), dtype=torch.long, device=out.device)
    ids = one_group if group_ids is None else group_ids.long()
    _normalize_rows_(out.copy_(advantages), mask, mean[ids], scale[ids])
