"""Values, and the small head that predicts an answer's group. n answer tokens, s sequences."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.batch.sequences import Sequences
from trainer.models.backbone import ALONE, Through
from trainer.models.packing import run


class Critic(nn.Module):
    """Values of the states in front of answer tokens, and logits of the sequence's group.

    Both are linear in the last hidden state. The group is read at the last prompt token (it judges
    the task) or at the last answer token (the paper; it judges the answer too).
    """

    def __init__(
        self,
        body: nn.Module,
        hidden_size: int,
        num_groups: int,
        on: str,
        through: Through = ALONE,
    ) -> None:
        super().__init__()
        self.body, self.through = body, through
        self.value_head = nn.Linear(hidden_size, 1)
        self.group_head = nn.Linear(hidden_size, num_groups)
        self.on = on
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        nn.init.normal_(self.group_head.weight, std=0.02)
        nn.init.zeros_(self.group_head.bias)

    @property
    def heads(self) -> list[nn.Module]:
        """What is computed in float32, whatever the body is computed in."""
        return [self.value_head, self.group_head]

    def forward(self, sequences: Sequences) -> tuple[Tensor, Tensor]:  # (n), (s, M)
        return self.through(lambda: self._values(sequences))

    def _values(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        hidden, layout = run(self.body, sequences, last=self.on == "response")
        judged = hidden[layout.prompt_ends if self.on == "prompt" else layout.ends]
        dtype = self.value_head.weight.dtype
        values = self.value_head(hidden[layout.before_answer].to(dtype)).sum(1)  # no view: FSDP2
        return values.float(), self.group_head(judged.to(dtype)).float()
