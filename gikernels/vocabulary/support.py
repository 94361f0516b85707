"""Rows that could only be sampled from some tokens: top-p, top-k, a grammar.

A chunk of such rows is padded to the longest: kept ids (n, K) and their logits, -inf where a row
has fewer. From there on it is a chunk of logits as any other (head.py); only the products differ.

Few ids: a logit is one dot product with a row of the weight. With dz the gradient of the kept
logits, dX is a sum over a row's ids and dW a sum over an id's rows. The cost is that of the kept
ids. In Triton no row is copied (support_triton.py); in PyTorch those of a chunk are gathered for
the dot products, and embedding_bag forms the sums.

Many ids: the whole vocabulary is multiplied, some rows at a time, so that their logits fit into the
workspace; the kept ones are picked from it. No (rows x vocabulary) mask ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gikernels.backends import checks, dispatch
from gikernels.backends.settings import workspace_for
from gikernels.reference import Support
from gikernels.vocabulary.head import Head, RowGrads, dlogits_, spans, tile_stats_

# A row has few ids where so many times their number is at most the vocabulary. On a CPU, at D 256,
# a kept id took as long as 85 columns of the whole product.
COLUMNS_OF_AN_ID = {"cpu": 64, "cuda": 512}

# --- arguments ----------------------------------------------------------------------------------


def support_arguments(
    support: Support | None, targets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if support is None:
        return None, None
    if not isinstance(support, tuple) or len(support) != 2:
        raise checks.wrong("support", support, "Support(offsets, ids) or None")
    offsets, ids = support
    checks.dims("support.ids", checks.ints("support.ids", ids), 1, "(nnz)")
    checks.ints("support.offsets", offsets)
    checks.shape("support.offsets", offsets, (targets.numel() + 1,), "(N + 1), N rows")
    checks.same_device(targets=targets, **{"support.offsets": offsets, "support.ids": ids})
    return offsets.long(), ids


def check_support(offsets: Tensor, ids: Tensor, vocab: int) -> None:
    """The values, on a CPU; elsewhere it would mean to wait for them."""
    if ids.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(ids) or (offsets.diff() < 0).any():
        raise ValueError(
            f"support.offsets: got {first} to {last}, want numbers that rise from 0 to {len(ids)}, "
            "the number of ids"
        )
    checks.ids_within("support.ids", ids, vocab)
    # Some rows at a time, as a copy of all ids can be large.
    for rows in _within(offsets, max(1, workspace_for(ids.device) // 32)):
        some = offsets[rows.start : rows.stop + 1]
        row = torch.arange(len(some) - 1).repeat_interleave(some.diff())
        seen = (row * vocab + ids[int(some[0]) : int(some[-1])]).sort().values
        twice = (seen.diff() == 0).nonzero()
        if len(twice):
            key = int(seen[twice[0]])
            raise ValueError(
                f"support.ids: got {key % vocab} twice in row {rows.start + key // vocab}, want "
                "different ids"
            )


def refuse_capture(tensor: Tensor) -> None:
    if dispatch.capturing(tensor):
        raise RuntimeError(
            "support, vocab_group: they wait for numbers of rows, as nobody may while a CUDA graph "
            "is captured"
        )


def _within(offsets: Tensor, size: int) -> Iterator[slice]:
    """Spans of rows with at most `size` ids, or of one row."""
    start, rows = 0, len(offsets) - 1
    while start < rows:
        fit = int(torch.searchsorted(offsets, offsets[start] + size, right=True)) - 1
        stop = min(max(fit, start + 1), rows)
        yield slice(start, stop)
        start = stop


# --- ids by row ---------------------------------------------------------------------------------


def _ends(lengths: Tensor) -> Tensor:
    """(n + 1) offsets of so many each."""
    return F.pad(lengths.cumsum(0), (1, 0))


class Sets(NamedTuple):
    """Row i has ids[offsets[i] : offsets[i + 1]]."""

    offsets: Tensor  # (N + 1)
    ids: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def of(self, rows: Tensor) -> Sets:
        """Those of some rows, one after the other."""
        lengths = self.lengths[rows]
        ends = _ends(lengths)
        at = (self.offsets[rows] - ends[:-1]).repeat_interleave(lengths)
        at += torch.arange(len(at), device=at.device)
        return Sets(ends, self.ids[at])

    def part(self, start: int, size: int) -> Sets:
        """Those of a part of the vocabulary, counted from its start."""
        local = self.ids - start
        mine = (local >= 0) & (local < size)
        return Sets(_ends(mine)[self.offsets], local[mine])


class Chunk(NamedTuple):
    rows: Tensor  # (n)
    at: Tensor  # (n, K) places in `ids`; their number, where padded
    ids: Tensor  # (n, K); 0 where padded
    pad: Tensor  # (n, K) bool
    whole: bool  # whether the whole vocabulary is multiplied
    triton: bool  # whether a few rows of the weight are, by the kernels

    def columns(self, targets: Tensor) -> Tensor:
        """(n) in which column the row's target is; K where it is not kept."""
        hit = (self.ids == targets[self.rows].unsqueeze(1)) & ~self.pad
        return torch.where(hit.any(1), hit.int().argmax(1), hit.shape[1])


def _many(sets: Sets, rows: Tensor, vocab: int) -> Tensor:
    """(n) bool: of which rows the whole vocabulary is multiplied."""
    columns = COLUMNS_OF_AN_ID["cpu" if rows.device.type == "cpu" else "cuda"]
    return sets.lengths[rows] * columns > vocab


def chunks(
    sets: Sets,
    rows: Tensor,
    row_bytes: Callable[[int], int],
    budget: int,
    whole: bool = False,
    triton: bool = False,
) -> Iterator[Chunk]:
    """The rows that have ids, the longest first, so that little is padded. `row_bytes` says what a
    row of so many ids needs of the budget."""
    lengths, order = sets.lengths[rows].sort(descending=True, stable=True)
    rows, known = rows[order], lengths.tolist()
    start = 0
    while start < len(known) and known[start]:
        longest = known[start]
        stop = start + max(1, budget // row_bytes(longest))
        some = rows[start:stop]
        steps = torch.arange(longest, device=rows.device)
        pad = steps >= lengths[start:stop].unsqueeze(1)
        at = (sets.offsets[some].unsqueeze(1) + steps).masked_fill_(pad, len(sets.ids))
        ids = sets.ids[at.clamp(max=len(sets.ids) - 1)].long().masked_fill_(pad, 0)
        yield Chunk(some, at, ids, pad, whole, triton)
        start = stop


def id_bytes(dtype: torch.dtype) -> int:
    """Of a kept id: z, its exponential, the reference's, a slope, a spare; its place and itself."""
    return 5 * dtype.itemsize + 16


def _chunks_of_head(
    sets: Sets, rows: Tensor, whole: bool, head: Head, dtype: torch.dtype, triton: bool
) -> Iterator[Chunk]:
    vocab, depth = head.weight.shape

    def row_bytes(ids: int) -> int:
        product = vocab if whole else depth if triton else 2 * ids * depth
        return ids * id_bytes(dtype) + product * dtype.itemsize

    return chunks(sets, rows, row_bytes, workspace_for(rows.device), whole, triton)


# --- the arithmetic of a chunk ------------------------------------------------------------------


class Rows(NamedTuple):
    """What the operation knows of each row, (N) each or (N, D)."""

    hidden: Tensor
    targets: Tensor  # within this part of the vocabulary
    temperature: Tensor
    ref_hidden: Tensor | None

    def pick(self, rows: Tensor) -> Rows:
        return Rows._make(None if x is None else x[rows] for x in self)


def _logits(x: Tensor, temperature: Tensor, head: Head, chunk: Chunk) -> Tensor:
    """Final logits (n, K) of x (n, D)."""
    dtype = temperature.dtype
    x = x.to(dtype) * head.inner(temperature)
    if chunk.whole:
        z = torch.empty(len(x), len(head.weight), dtype=dtype, device=x.device)
        for cols in _slabs(head.weight, dtype):
            z[:, cols] = x @ head.weight[cols].to(dtype).T
        z = z.gather(1, chunk.ids)
    elif chunk.triton:
        from gikernels.vocabulary import support_triton

        z = support_triton.dots(x, head.weight, chunk.ids)
    else:
        w = head.weight.index_select(0, chunk.ids.view(-1)).to(dtype)
        z = w.view(*chunk.ids.shape, -1).mul_(x.unsqueeze(1)).sum(2)
    bias = None if head.bias is None else head.bias[chunk.ids].to(dtype)
    return head.finish_(z, temperature, bias).masked_fill_(chunk.pad, -torch.inf)


def _slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Of which a copy in another precision, where one is needed, is small."""
    vocab, depth = weight.shape
    size = workspace_for(weight.device) // (4 * dtype.itemsize)
    return spans(vocab, vocab if weight.dtype == dtype else max(1, size // max(1, depth)))


def _both_logits(
    rows: Rows, head: Head, ref_head: Head | None, chunk: Chunk
) -> tuple[Tensor, Tensor | None]:
    temperature = rows.temperature[chunk.rows]
    z = _logits(rows.hidden[chunk.rows], temperature, head, chunk)
    if rows.ref_hidden is None or ref_head is None:
        return z, None
    return z, _logits(rows.ref_hidden[chunk.rows], temperature, ref_head, chunk)


def forward(
    rows: Rows,
    sets: Sets,
    which: Tensor,  # indices of the rows that are looked at
    head: Head,
    ref_head: Head | None,
    stats: Tensor,  # (3 or 6, N) of RowStats; rows without ids stay as they are
    target_u: Tensor,  # (N) the target's logit minus the peak; likewise
    backend: str,
) -> None:
    """Fills stats and target_u."""
    many = _many(sets, which, len(head.weight))
    for some, whole in ((which[~many], False), (which[many], True)):
        for chunk in _chunks_of_head(sets, some, whole, head, stats.dtype, backend == "triton"):
            z, ref_z = _both_logits(rows, head, ref_head, chunk)
            column = chunk.columns(rows.targets)
            row = tile_stats_(z, torch.empty_like(z), ref_z)  # leaves z - peak
            u = z.gather(1, column.clamp(max=z.shape[1] - 1).unsqueeze(1)).squeeze(1)
            target_u[chunk.rows] = torch.where(column < z.shape[1], u, -torch.inf)
            stats[:, chunk.rows] = torch.stack([x for x in row if len(x)])


def _dlogits(
    rows: Rows, head: Head, ref_head: Head | None, grads: RowGrads, chunk: Chunk
) -> Tensor:
    """(n, K): the gradient of hidden @ weight.T + bias at the kept ids."""
    some = grads.rows(chunk.rows)._replace(targets=chunk.columns(rows.targets))
    z, ref_z = _both_logits(rows, head, None if some.per_ref_u is None else ref_head, chunk)
    temperature = rows.temperature[chunk.rows]
    dz = dlogits_(z, torch.empty_like(z), ref_z, some, 0, head.outer(temperature))
    # The slope of a softcap is infinite at the logits of padding.
    back = some.factor * head.logit_scale / temperature
    return dz.masked_fill_(chunk.pad, 0).mul_(back.unsqueeze(1))


def backward(
    rows: Rows,
    sets: Sets,
    which: Tensor,  # indices of the rows that have a gradient
    head: Head,
    ref_head: Head | None,
    grads: RowGrads,  # (N)
    dx: Tensor | None,  # (N, D), in the precision of the statistics; written at `which`
    want_dw: bool,
    db: Tensor | None,  # (V), in the precision of the statistics; added to
    backend: str,
) -> Tensor | None:
    """dW in the weight's precision, or None where it is 0 or not wanted."""
    many = _many(sets, which, len(head.weight))
    few, many = which[~many], which[many]
    dw = None
    if len(few):
        some, ids = rows.pick(few), sets.of(few)
        dw = _of_few(some, ids, few, head, ref_head, grads.rows(few), dx, want_dw, db, backend)
    if len(many):
        dw_many = _of_many(rows, sets, many, head, ref_head, grads, dx, want_dw, db)
        dw = dw_many if dw is None or dw_many is None else dw_many.add_(dw)
    return None if dw is None else dw.to(head.weight.dtype)


def _of_few(
    rows: Rows,
    sets: Sets,
    places: Tensor,  # of these rows among all
    head: Head,
    ref_head: Head | None,
    grads: RowGrads,
    dx: Tensor | None,
    want_dw: bool,
    db: Tensor | None,
    backend: str,
) -> Tensor | None:
    every = torch.arange(len(places), device=places.device)
    # Padding goes to a place after the last.
    dz = rows.temperature.new_zeros(len(sets.ids) + 1)
    for chunk in _chunks_of_head(sets, every, False, head, dz.dtype, backend == "triton"):
        dz[chunk.at] = _dlogits(rows, head, ref_head, grads, chunk)
    dz, ids = dz[:-1], sets.ids.long()
    if db is not None:
        _add_at(db, ids, dz)
    if dx is not None:
        dx[places] = _bags(ids, head.weight, sets.offsets, dz, dx.dtype, backend)
    if not want_dw:
        return None
    # The same sum, seen from an id: the rows that kept it.
    ids, order = ids.sort(stable=True)
    of = every.repeat_interleave(sets.lengths)[order]
    bounds = torch.searchsorted(ids, torch.arange(len(head.weight) + 1, device=ids.device))
    return _bags(of, rows.hidden, bounds, dz[order], head.weight.dtype, backend)


def _bags(
    ids: Tensor, table: Tensor, offsets: Tensor, factors: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """out[i] = sum over the ids of bag i of factor * table[id], in `dtype`."""
    if backend == "triton":
        from gikernels.vocabulary import support_triton

        return support_triton.bags(ids, table, offsets, factors, dtype)
    factors = factors.to(table.dtype)
    return F.embedding_bag(
        ids, table, offsets, mode="sum", per_sample_weights=factors, include_last_offset=True
    ).to(dtype)


def _add_at(out: Tensor, ids: Tensor, values: Tensor) -> None:
    """Adds in the same order in every run, which is another function on each device."""
    if out.is_cuda:
        out.index_put_((ids,), values, accumulate=True)
    else:
        out.index_add_(0, ids, values)


def _of_many(
    rows: Rows,
    sets: Sets,
    which: Tensor,
    head: Head,
    ref_head: Head | None,
    grads: RowGrads,
    dx: Tensor | None,
    want_dw: bool,
    db: Tensor | None,
) -> Tensor | None:
    dtype, weight = rows.temperature.dtype, head.weight
    dw = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if want_dw else None
    for chunk in _chunks_of_head(sets, which, True, head, dtype, False):
        dz = _dlogits(rows, head, ref_head, grads, chunk)
        spread = dz.new_zeros(len(dz), len(weight)).scatter_add_(1, chunk.ids, dz)
        x = rows.hidden[chunk.rows].to(dtype)
        out = torch.zeros_like(x)
        for cols in _slabs(weight, dtype):
            if dx is not None:
                out.addmm_(spread[:, cols], weight[cols].to(dtype))
            if dw is not None:
                dw[cols].addmm_(spread[:, cols].T, x)
        if dx is not None:
            dx[chunk.rows] = out
        if db is not None:
            db += spread.sum(0)
    return dw
