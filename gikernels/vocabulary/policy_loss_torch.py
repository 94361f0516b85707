"""linear_policy_loss in chunks of PyTorch: their logits, their loss, their share of the gradients.

Runs everywhere; the Triton half is policy_loss_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gikernels.backends.settings import workspace_for
from gikernels.vocabulary.formed import saved_dtype
from gikernels.vocabulary.head import (
    Head,
    RowStats,
    dlogits_,
    merge,
    pick_target,
    row_grads,
    scratch,
    slab,
    spans,
    tile_stats_,
    view,
    weighted_rows,
)
from gikernels.vocabulary.policy_loss_terms import Recipe, Tokens, active_rows


def chunked(
    hidden: Tensor,  # (n, D)
    tokens: Tokens,
    head: Head,
    recipe: Recipe,
    scale: Tensor,  # () what the gradients are multiplied by
    wanted: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Log-probabilities and entropies (n), and the gradients of hidden, weight and bias."""
    n, v, dtype = len(hidden), len(head.weight), tokens.temperature.dtype
    logprobs, entropy = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
    # The logits of a chunk of rows; of some columns the exponentials and, with a softcap, slope.
    # A weight that is converted is converted in the cache.
    in_cache = hidden.device.type == "cpu" and head.weight.dtype != dtype
    wide = min(v, 1024 if in_cache else max(1024, v // 8))
    tall = max(1, workspace_for(hidden.device) // dtype.itemsize // (v + 2 * wide))
    if hidden.device.type == "cpu":  # many rows of a small vocabulary would leave the cache
        tall = min(tall, max(1024, (1 << 20) // v))
    tall = min(max(n, 1), tall)
    shapes = (hidden.shape, head.weight.shape, head.weight.shape[:1])
    # One chunk gives each element of dW in one product, which can be rounded at once.
    only = 0 < n <= tall
    dw_dtype = saved_dtype(head.weight) if only else dtype
    sums = [
        (hidden.new_empty if only and at == 1 else hidden.new_zeros)(shapes[at], dtype=d)
        if wanted[at]
        else None
        for at, d in enumerate((dtype, dw_dtype, dtype))
    ]
    own = slab(head, wide, dtype)
    z, spare = scratch(hidden, tall * v, 1, dtype)[0], scratch(hidden, tall * wide, 1, dtype)[0]
    for rows in spans(n, tall):
        x, some = hidden[rows].to(dtype), tokens.rows(rows)
        # Each block of columns is contiguous, for the sake of the products.
        tiles = [
            (cols, z[len(x) * cols.start : len(x) * cols.stop].view(len(x), -1))
            for cols in spans(v, wide)
        ]
        stats, peaks, target_z = None, [], torch.full_like(some.temperature, torch.nan)
        for cols, tile in tiles:
            head.columns(cols, dtype, own).logits(x, some.temperature, tile)
            target_z = pick_target(target_z, tile, some.targets, cols.start)
            new = tile_stats_(tile, view(spare, rows, cols))  # leaves tile - new.peak
            peaks.append(new.peak)
            stats = new if stats is None else merge(stats, new)
        assert stats is not None
        logprobs[rows] = target_z - stats.peak - stats.total.log()
        entropy[rows] = stats.entropy
        if any(wanted):
            _add_gradients(
                x, some, logprobs[rows], stats, tiles, peaks, spare, own, head, recipe, scale, sums,
                rows, only,
            )  # fmt: skip
    return logprobs, entropy, sums


def _add_gradients(
    x: Tensor,  # (n, D): a chunk of rows
    tokens: Tokens,
    logprobs: Tensor,
    stats: RowStats,
    tiles: list[tuple[slice, Tensor]],  # columns, and their logits minus the tile's own peak
    peaks: list[Tensor],  # of the tiles, (n) each
    spare: Tensor,
    own: Tensor | None,  # a slab for the weight
    head: Head,
    recipe: Recipe,
    scale: Tensor,
    sums: list[Tensor | None],
    rows: slice,  # where the chunk lies in sums[0]
    only: bool,  # whether no other chunk adds to dW, which is uninitialised then
) -> None:
    all_dx, dw, db = sums
    slope = recipe.slope(logprobs, tokens)
    active = active_rows(slope, recipe)
    if len(active) == 0:
        if only and dw is not None:
            dw.zero_()
        return

    def pick(t: Tensor) -> Tensor:
        return t if len(active) == len(slope) else t[active]

    x, temperature = pick(x), pick(tokens.temperature)
    stats = RowStats._make(pick(t) if len(t) else t for t in stats)
    g_logprob = pick(slope) * scale
    g_entropy = None
    if recipe.entropy_coef:
        g_entropy = pick(recipe.entropy_slope(logprobs, tokens)) * scale
    grads = row_grads(pick(tokens.targets), stats, pick(logprobs), g_logprob, g_entropy, None)
    back = grads.factor * head.logit_scale / temperature
    outer = head.outer(temperature)
    everywhere, narrow = len(active) == len(slope), head.weight.shape[0] <= x.shape[1]
    dx = None
    if all_dx is not None:
        dx = all_dx[rows] if everywhere else torch.zeros_like(x)
    scaled = x if narrow else x * back.unsqueeze(1)
    for (cols, full_tile), full_peak in zip(tiles, peaks):
        tile, peak = pick(full_tile), pick(full_peak)
        if outer is None:
            shifted = grads._replace(peak=stats.peak - peak)
        else:  # the slope of the softcap wants the logits themselves
            shifted = grads
            tile.add_(peak.unsqueeze(1))
        dz = dlogits_(tile, view(spare, slice(0, len(x)), cols), None, shifted, cols.start, outer)
        if db is not None:
            db[cols] += weighted_rows(dz, back, view(spare, slice(0, len(x)), cols))
        if narrow:  # dZ is smaller than x and dX
            dz.mul_(back.unsqueeze(1))
        if dx is not None:
            dx.addmm_(dz, head.columns(cols, dz.dtype, own).weight)
        if dw is not None:
            if dw.dtype == dz.dtype:
                dw[cols].addmm_(dz.T, scaled, beta=int(not only))
            elif own is not None:  # the only chunk; the slab is free again
                dw[cols] = torch.mm(dz.T, scaled, out=own[: cols.stop - cols.start])
    if dx is not None and all_dx is not None:
        if not narrow:
            dx.mul_(back.unsqueeze(1))
        if not everywhere:
            all_dx[rows][active] = dx
