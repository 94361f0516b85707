"""The reward model: one score an answer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.batch.sequences import Sequences
from trainer.config import ConfigError
from trainer.models.packing import last_hidden
from trainer.models.saving import save_pretrained
from trainer.models.states import at


class RewardModel(nn.Module):
    """A `...ForSequenceClassification` model with one label, read in one of two ways.

    "last": the score at the last token, as Hugging Face reads it. "pooled": the mean of the scores
    at the answer's tokens. Both have the same weights (a linear map commutes with the mean), so
    both save and load as the same Hugging Face class; `config.reward_head` says which is meant, and
    Hugging Face's own forward() of a pooled model gives the score at the last token instead.
    Backbones without a per-token `score` layer (encoders) keep their own forward and are "last".
    """

    def __init__(self, model: PreTrainedModel, head: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head or getattr(model.config, "reward_head", "last")
        model.config.reward_head = self.head
        if self.head == "pooled" and not hasattr(model, "score"):
            raise ConfigError(
                f"pooled: {type(model).__name__} has no score at each token; want last", "rm.head"
            )

    def forward(self, sequences: Sequences) -> Tensor:  # (s)
        tokens, lengths = sequences.tokens, sequences.lengths
        if not hasattr(self.model, "score"):
            seen = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
            return self.model(tokens, attention_mask=seen.long()).logits[:, 0].float()
        hidden = last_hidden(self.model.base_model, tokens, lengths)
        if self.head == "last":
            return self.model.score(at(hidden, lengths - 1))[:, 0].float()
        places = torch.arange(tokens.shape[1], device=tokens.device)
        answer = (places >= sequences.prompt_lengths.unsqueeze(1)) & (places < lengths.unsqueeze(1))
        scores = self.model.score(hidden)[..., 0].float().masked_fill(~answer, 0)
        return scores.sum(1) / sequences.answer_lengths

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        save_pretrained(self.model, path, tokenizer)
