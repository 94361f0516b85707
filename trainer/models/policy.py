"""The policy and the frozen reference: token log-probabilities of answers, never logits.

It takes `Sequences` and works on answer tokens only: the state before answer token t is the hidden
state of the token in front of it. s sequences, T padded answer tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gikernels
from gikernels import TokenStats
from trainer.batch.sequences import Sequences
from trainer.models.saving import save_pretrained
from trainer.models.states import answer_states, before_answer, unflatten


class Policy(nn.Module):
    """A causal language model that returns statistics of its answer tokens, never logits.

    The head's operation runs inside forward(), where a sharded head is gathered.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling.
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def forward(
        self, sequences: Sequences, temperature: float = 1.0, reference: Policy | None = None
    ) -> TokenStats:
        """(s, T) each; with a reference, `kl` is the exact KL over the vocabulary."""
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref = (answer_states(reference.model.base_model, sequences), reference.head.weight)
        stats = gikernels.linear_logprobs(
            answer_states(self.model.base_model, sequences),
            self.head.weight,
            sequences.tokens[:, 1:][before_answer(sequences)],
            temperature,
            bias=self.head.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ref=ref,
        )
        mask = sequences.mask
        return TokenStats(
            logprobs=unflatten(stats.logprobs, mask),
            entropy=unflatten(stats.entropy, mask),
            kl=None if stats.kl is None else unflatten(stats.kl, mask),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32, before the temperature: for sampling one token."""
        z = self.logit_scale * self.head(hidden).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        save_pretrained(self.model, path, tokenizer)
