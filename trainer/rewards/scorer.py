"""What an answer scores: a reward model, Python functions, or a weighted sum of them.

Functions work in threads, the reward model where the scores are asked for: what is done between
`submit` and `collect` is done while remote scorers answer. When they do is no part of the result.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.sequences import Sequences, forward_all
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.models.reward import RewardModel
from trainer.rewards.errors import RewardError
from trainer.rewards.functions import load_functions
from trainer.runs.console import say


@dataclass(frozen=True)
class Submitted:
    """Answers whose scores are on their way."""

    prompts: list[Prompt]
    sequences: Sequences
    truncated: Tensor  # (S) bool
    mine: slice
    """The answers that this rank judges: each is judged on one."""
    parts: dict[str, Future[Tensor]]


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
        if self.functions:
            names = ", ".join(function.describe() for function, _ in self.functions.values())
            say(f"reward {names}")
        self.pool = ThreadPoolExecutor(max(1, len(self.functions)), "reward")

    def __call__(
        self, prompts: list[Prompt], sequences: Sequences, truncated: Tensor
    ) -> dict[str, Tensor]:
        """{"total": (S), "model": (S), function's name: (S) ...}; prompts has one for each row."""
        return self.collect(self.submit(prompts, sequences, truncated))

    def submit(self, prompts: list[Prompt], sequences: Sequences, truncated: Tensor) -> Submitted:
        mine = parallel.share(len(prompts))
        parts: dict[str, Future[Tensor]] = {}
        if self.functions:
            rows = sequences.answers()[mine]
            texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            asked, meta = [p.text for p in prompts[mine]], [p.meta for p in prompts[mine]]
            for name, (function, _) in self.functions.items():
                parts[name] = self.pool.submit(function, asked, texts, meta)
        return Submitted(prompts, sequences, truncated, mine, parts)

    def collect(self, submitted: Submitted) -> dict[str, Tensor]:
        truncated = submitted.truncated
        parts: dict[str, tuple[Tensor, float]] = {}
        weight = self.config.reward.model_weight
        if self.model is not None and weight:
            parts["model"] = (self._by_model(self.model, submitted), weight)
        for name, (_, weight) in self.functions.items():
            scores = torch.zeros(len(submitted.prompts))
            scores[submitted.mine] = _on_all_ranks(submitted.parts[name])
            parts[name] = (parallel.all_sum(scores.to(truncated.device)), weight)
        total = -self.config.reward.truncated_penalty * truncated.float()
        for scores, weight in parts.values():
            total = total + weight * scores
        return {"total": total, **{name: scores for name, (scores, _) in parts.items()}}

    def _by_model(self, model: RewardModel, submitted: Submitted) -> Tensor:
        read = submitted.sequences
        if self.model_tokenizer is not None:
            read = self._retokenised(submitted.prompts, read, submitted.truncated)
        budget = self.config.trainer.tokens_per_microbatch
        (scores,) = forward_all(lambda part: (model(part),), read, budget, (False,))
        return scores

    def _retokenised(
        self, prompts: list[Prompt], sequences: Sequences, truncated: Tensor
    ) -> Sequences:
        """The same answers in the reward model's own tokens: to messages rendered by its own
        template where it has one, else to the prompts' texts."""
        theirs = self.model_tokenizer
        assert theirs is not None
        answers = self.tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
        texts = self.tokenizer.batch_decode(sequences.prompts(), skip_special_tokens=True)
        ends = [theirs.eos_token_id] if theirs.eos_token_id is not None else []
        rows = [
            _in_their_words(theirs, prompt, text, answer, [] if cut else ends, cut)
            for prompt, text, answer, cut in zip(prompts, texts, answers, truncated.tolist())
        ]
        prompt_ids, answer_ids = zip(*rows)
        return Sequences.of(prompt_ids, answer_ids, shared=sequences.prompt_of is not None)


def _in_their_words(
    theirs: PreTrainedTokenizerBase,
    prompt: Prompt,
    text: str,
    answer: str,
    ends: list[int],
    truncated: bool,
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer."""

    def ids(text: str, special: bool = False) -> list[int]:
        return theirs(text, add_special_tokens=special, verbose=False)["input_ids"]

    if prompt.messages is None or not getattr(theirs, "chat_template", None):
        return ids(text, special=True), ids(answer) + ends
    render = functools.partial(theirs.apply_chat_template, tokenize=False)
    before = render(prompt.messages, add_generation_prompt=True)
    whole = render([*prompt.messages, {"role": "assistant", "content": answer}])
    # How a turn ends is for the template to say; one that was cut has not ended.
    told = whole[len(before) :] if whole.startswith(before) and not truncated else None
    return ids(before), ids(answer) + ends if told is None else ids(told)


def _on_all_ranks(part: Future[Tensor]) -> Tensor:
    """A function's scores; where it fails on one rank, all of them say so and end."""
    error = part.exception()
    said = parallel.gather_objects(str(error) if error else None)
    if error:
        raise error
    for rank, problem in enumerate(said):
        if problem:
            raise RewardError(f"{problem} (of rank {rank})")
    return part.result()
