"""The policy and the frozen reference: a causal language model that is asked about its answers.

    stats = policy(sequences, log_probabilities(temperature))            TokenStats, (n) each
    loss = policy(sequences, lambda hidden, head, targets: ...)          or anything else

What is asked is computed from the hidden states in front of answer tokens, inside forward(), where
a sharded head is gathered. Logits are never in memory. n answer tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gikernels
from gikernels import Support, TokenStats
from gikernels.integrations.huggingface import linear_form
from trainer.batch.sequences import Sequences
from trainer.models.backbone import ALONE, Through
from trainer.models.packing import run
from trainer.models.saving import save


class Head(NamedTuple):
    """Logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """As the operations' keywords."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


PIECE = 8192
"""Rows of a head that are in float32 at the same time."""
Out = TypeVar("Out")
Ask = Callable[[Tensor, Head, Tensor], Out]
"""hidden (n, D), the head, targets (n) -> whatever is asked."""


def log_probabilities(temperature: float = 1.0, support: Support | None = None) -> Ask[TokenStats]:
    """`support`: of these very answer tokens, on their device."""
    return lambda hidden, head, targets: gikernels.linear_logprobs(
        hidden, head.weight, targets, temperature, support=support, **head.options
    )


class Policy(nn.Module):
    def __init__(self, model: PreTrainedModel, through: Through = ALONE) -> None:
        super().__init__()
        self.model, self.through = model, through
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling.
        self.logit_scale: float = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(self, sequences: Sequences, ask: Ask[Out]) -> Out:
        def do() -> Out:
            hidden, layout = run(self.model.base_model, sequences)
            hidden, head = self.linear_head(hidden[layout.before_answer])
            return ask(hidden, head, sequences.answer_tokens)

        return self.through(do)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32, before the temperature: for sampling one token, inside
        `through`."""
        hidden, (weight, bias, _, _) = self.linear_head(hidden)
        if hidden.is_cuda and hidden.dtype != torch.float32:  # products of half precision, summed
            z = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            z = z.view(*hidden.shape[:-1], len(weight))
        else:
            z = _exactly(hidden, weight)
        z = self.logit_scale * (z if bias is None else z + bias.float())
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def linear_head(self, hidden: Tensor) -> tuple[Tensor, Head]:
        """An adapter of the head makes it wider, and what goes into it as well."""
        hidden, weight, bias = linear_form(self.head, hidden)
        return hidden, Head(weight, bias, self.softcap, self.logit_scale)

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        save(self.model, self.through, path, tokenizer, dtype)


def _exactly(hidden: Tensor, weight: Tensor) -> Tensor:
    """Their product in float32. A head in half precision is widened a piece at a time, into the
    same memory: all of it in float32 would be half as large again as a model of 0.5B."""
    x = hidden.float()
    if weight.dtype == torch.float32:
        return x @ weight.t()
    z, spare = x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(PIECE, x.shape[-1])
    for start in range(0, len(weight), PIECE):
        rows = weight[start : start + PIECE]
        z[..., start : start + PIECE] = x @ spare[: len(rows)].copy_(rows).t()
    return z
