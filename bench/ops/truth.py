"""What a head computes, in float64 at the full size, where float64 of everything would not fit.

Values of all rows, dX of some rows, dW of some tokens: a pass over chunks of rows for the
log-probabilities, and one for the gradients. dW of a token sums over all rows, which is where
accumulation in 16 bits shows and a check of a few rows cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ops.calls import upstream, values_and_gradients
from bench.ops.case import Case
from bench.ops.peers import Contender, Inputs, Outputs

CHUNK = 512  # rows of float64 logits at a time: 525 MB at a vocabulary of 128256
KEPT = 256  # rows of dX, and tokens of dW that are targets and that are not, each


class Truth(NamedTuple):
    rows: Tensor  # of which "d hidden" is kept
    tokens: Tensor  # of which "d weight" is kept
    found: Outputs


def kept(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    n, v = len(inputs["hidden"]), len(inputs["weight"])
    rows = torch.randperm(n, generator=rng)[:KEPT].sort().values
    tokens = torch.randperm(v, generator=rng)[:KEPT].to(inputs["targets"].device)
    tokens = torch.cat([tokens, inputs["targets"][:KEPT]]).unique()
    return rows.to(tokens.device), tokens


def of(case: Case, inputs: Inputs, names: tuple[str, ...]) -> Truth:
    """For those who compute the outputs `names`, under the upstream gradients that they get."""
    assert case.finish is not None
    weight = inputs["weight"].double()
    pieces = list(range(0, len(inputs["hidden"]), CHUNK))

    def chunks() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for start in pieces:
            part = slice(start, start + CHUNK)
            hidden = inputs["hidden"][part].double()
            yield part, hidden, (hidden @ weight.T).log_softmax(-1), inputs["targets"][part, None]

    per_row = [
        torch.stack([logp.gather(-1, targets)[:, 0], -(logp.exp() * logp).sum(-1)])
        for _, _, logp, targets in chunks()
    ]
    logprobs, entropy = (x.requires_grad_() for x in torch.cat(per_row, 1))
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
        if name not in ("hidden", "weight")
    }
    outputs = {k: x for k, x in case.finish(exact, logprobs, entropy).items() if k in names}
    gradients = torch.autograd.grad(
        list(outputs.values()), [logprobs, entropy], upstream(outputs), allow_unused=True
    )
    d_logprobs, d_entropy = (
        torch.zeros_like(logprobs) if g is None else g.detach() for g in gradients
    )
    rows, tokens = kept(inputs)
    d_hidden = weight.new_zeros(len(rows), weight.shape[1])
    d_weight = weight.new_zeros(len(tokens), weight.shape[1])
    for part, hidden, logp, targets in chunks():
        p, h = logp.exp(), entropy.detach()[part, None]
        dz = -p * (d_logprobs[part, None] + d_entropy[part, None] * (logp + h))
        dz.scatter_add_(1, targets, d_logprobs[part, None])
        d_weight += dz[:, tokens].T @ hidden
        here = (rows >= part.start) & (rows < part.stop)
        d_hidden[here] = dz[rows[here] - part.start] @ weight
    values = {name: x.detach() for name, x in outputs.items()}
    return Truth(rows, tokens, values | {"d hidden": d_hidden, "d weight": d_weight})


def errors(
    case: Case, contender: Contender, inputs: Inputs, truths: dict[tuple[str, ...], Truth]
) -> dict[str, float]:
    """As `calls.errors`, at the size of `inputs`; `truths` keeps what is known between calls."""
    found = values_and_gradients(case, contender.run, inputs)
    names = tuple(sorted(name for name in found if not name.startswith("d ")))
    if names not in truths:
        truths[names] = of(case, inputs, names)
    truth = truths[names]
    chosen = {"d hidden": truth.rows, "d weight": truth.tokens}
    return {
        name: _error(x[chosen[name]] if name in chosen else x, truth.found[name])
        for name, x in found.items()
    }


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).abs().max() / exact.abs().max()).item()
