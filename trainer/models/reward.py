"""One score an answer. s sequences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.batch.sequences import Sequences, on_device
from trainer.config import ConfigError
from trainer.models.backbone import ALONE, Through
from trainer.models.packing import grid_of, run
from trainer.models.saving import save


class RewardModel(nn.Module):
    """A `...ForSequenceClassification` model with one label, read in one of two ways.

    "last": the score at the last token, as Hugging Face reads it. "pooled": the mean of the scores
    at the answer's tokens. Both have the same weights (a linear map commutes with the mean), so
    both save and load as the same Hugging Face class; `config.reward_head` says which is meant, and
    Hugging Face's own forward() of a pooled model gives the score at the last token instead.
    Backbones without a per-token `score` layer (encoders) keep their own forward and are "last".
    """

    def __init__(
        self, model: PreTrainedModel, head: str | None = None, through: Through = ALONE
    ) -> None:
        super().__init__()
        self.model, self.through = model, through
        self.head = head or getattr(model.config, "reward_head", "last")
        model.config.reward_head = self.head
        if self.head == "pooled" and not hasattr(model, "score"):
            raise ConfigError(
                f"pooled: {type(model).__name__} has no score at each token; want last", "rm.head"
            )

    @property
    def heads(self) -> list[nn.Module]:
        """What is computed in float32, whatever the body is computed in."""
        return [self.model.score] if hasattr(self.model, "score") else []

    def forward(self, sequences: Sequences) -> Tensor:  # (s)
        return self.through(lambda: self._scores(sequences))

    def _scores(self, sequences: Sequences) -> Tensor:
        if not hasattr(self.model, "score"):
            grid, _ = grid_of(sequences, last=True)
            places = torch.arange(grid.shape[1], device=grid.device)
            seen = places < on_device(sequences.lengths).unsqueeze(1)
            tokens = on_device(sequences.tokens)[grid]
            return self.model(tokens, attention_mask=seen.long()).logits[:, 0].float()
        hidden, layout = run(self.model.base_model, sequences, last=True)
        places = layout.ends if self.head == "last" else layout.answer
        scores = self.model.score(hidden[places].to(self.model.score.weight.dtype))[:, 0]
        if self.head == "last":
            return scores
        return sequences.sums(scores) / on_device(sequences.answer_lengths)

    def save(self, path: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        save(self.model, self.through, path, tokenizer, dtype, self.heads)
