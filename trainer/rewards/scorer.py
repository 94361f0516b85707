"""What an answer scores: a reward model, Python functions, or a weighted sum of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.sequences import Sequences, forward_all
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.models.reward import RewardModel
from trainer.rewards.functions import load_functions


class Scorer:
    """Raw scores of answers, each component beside the weighted total."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model: RewardModel | None,
        model_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config, self.tokenizer, self.model = config, tokenizer, model
        # None: the reward model reads the policy's token ids as they are.
        same = model_tokenizer is None or model_tokenizer.get_vocab() == tokenizer.get_vocab()
        self.model_tokenizer = None if same else model_tokenizer
        self.functions = load_functions(config)

    def __call__(
        self, prompts: list[Prompt], sequences: Sequences, truncated: Tensor
    ) -> dict[str, Tensor]:
        """{"total": (S), "model": (S), function's name: (S) ...}; prompts has one for each row."""
        parts: dict[str, tuple[Tensor, float]] = {}
        model, weight = self.model, self.config.reward.model_weight
        if model is not None and weight:
            read = sequences
            if self.model_tokenizer is not None:
                read = self._retokenised(self.model_tokenizer, sequences, truncated)
            budget = self.config.trainer.tokens_per_microbatch
            (scores,) = forward_all(lambda part: (model(part),), read, budget, (False,))
            parts["model"] = (scores, weight)
        if self.functions:
            texts = self.tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
            for name, (function, weight) in self.functions.items():
                mine = parallel.share(len(texts))  # each answer is judged on one rank
                some = prompts[mine]
                scores = torch.zeros(len(texts))
                scores[mine] = function([p.text for p in some], texts[mine], [p.meta for p in some])
                parts[name] = (parallel.all_sum(scores.to(truncated.device)), weight)
        total = -self.config.reward.truncated_penalty * truncated.float()
        for scores, weight in parts.values():
            total = total + weight * scores
        return {"total": total, **{name: scores for name, (scores, _) in parts.items()}}

    def _retokenised(
        self, theirs: PreTrainedTokenizerBase, sequences: Sequences, truncated: Tensor
    ) -> Sequences:
        """The same texts in the reward model's own tokens."""

        def translate(rows: list[list[int]], **options: bool) -> list[list[int]]:
            texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            return theirs(texts, **options)["input_ids"]

        eos = [theirs.eos_token_id] if theirs.eos_token_id is not None else []
        answers = [
            ids + (eos if ended else [])
            for ids, ended in zip(
                translate(sequences.answers(), add_special_tokens=False), (~truncated).tolist()
            )
        ]
        return Sequences.of(
            translate(sequences.prompts()), answers, shared=sequences.prompt_of is not None
        )
