"""The critic: values, and the small head that predicts an answer's group."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.batch.sequences import Sequences
from trainer.models.packing import last_hidden
from trainer.models.states import answer_states, at, before_answer, unflatten


class Critic(nn.Module):
    """Values of the states in front of answer tokens, and logits of the sequence's group.

    Both are linear in the last hidden state. The group is read at the last prompt token (it judges
    the task) or at the last answer token (the paper; it judges the answer too).
    """

    def __init__(self, body: PreTrainedModel, hidden_size: int, num_groups: int, on: str) -> None:
        super().__init__()
        self.body = body
        self.value_head = nn.Linear(hidden_size, 1)
        self.group_head = nn.Linear(hidden_size, num_groups)
        self.on = on
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        nn.init.normal_(self.group_head.weight, std=0.02)
        nn.init.zeros_(self.group_head.bias)

    def forward(self, sequences: Sequences) -> tuple[Tensor, Tensor]:  # (s, T), (s, M)
        if self.on == "prompt":
            states = answer_states(self.body, sequences)
            lengths = sequences.answer_lengths
            judged = states[lengths.cumsum(0) - lengths]  # in front of each answer's first token
        else:
            hidden = last_hidden(self.body, sequences.tokens, sequences.lengths)
            states = hidden[:, :-1][before_answer(sequences)]
            judged = at(hidden, sequences.lengths - 1)
        values = self.value_head(states)[:, 0].float()
        return unflatten(values, sequences.mask), self.group_head(judged).float()
