"""What an answer scores: a reward model, Python functions, or a weighted sum of them.

A reward function is any `package.module:function`:

    def concise(prompts: list[str], answers: list[str], meta: list[dict]) -> list[float]:
        return [-len(answer) / 100 for answer in answers]

`meta` has what else the prompt's data row holds. It returns one finite number for each answer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batching import Sequences, forward_all
from trainer.models import RewardModel


class RewardError(ValueError):
    """One line: which reward function, and what it did."""

    for_user = True


class RewardFunction:
    """A user's function, called with texts and checked."""

    def __init__(self, place: str, key: str) -> None:
        self.place, self.key = place, key
        module, _, name = place.partition(":")
        if str(Path.cwd()) not in sys.path:  # a file beside the config, as `python -m` would find
            sys.path.insert(0, str(Path.cwd()))
        try:
            target = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
        except Exception as error:
            raise RewardError(f"{key}: cannot import {place}: {_one_line(error)}") from error
        if not callable(target):
            raise RewardError(f"{key}: {place} is a {type(target).__name__}, want a function")
        self.function: Callable = target

    def __call__(self, prompts: list[str], answers: list[str], meta: list[dict]) -> Tensor:
        try:
            scores = self.function(prompts, answers, meta)
        except Exception as error:
            raise RewardError(f"{self.key}: {self.place} raised {_one_line(error)}") from error
        want = f"want {len(answers)} numbers, one for each answer"
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"{self.key}: {self.place} returned {type(scores).__name__}, {want}: "
                f"{_one_line(error)}"
            ) from error
        if scores.shape != (len(answers),):
            raise RewardError(
                f"{self.key}: {self.place} returned shape {tuple(scores.shape)}, {want}"
            )
        return scores


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_functions(config) -> dict[str, tuple[RewardFunction, float]]:
    """name -> (function, weight)."""
    return {
        each.label: (RewardFunction(each.function, f"reward.functions[{i}]"), each.weight)
        for i, each in enumerate(config.reward.functions)
    }


def check_functions(config, prompts) -> None:
    """Call every reward function once, on prompts and an empty answer, before a run begins."""
    some = prompts[:2]
    for function, _ in load_functions(config).values():
        scores = function([p.text for p in some], [""] * len(some), [p.meta for p in some])
        if not torch.isfinite(scores).all():  # later on, the guard skips such a step
            first = int((~torch.isfinite(scores)).nonzero()[0])
            raise RewardError(
                f"{function.key}: {function.place} returned {scores[first]} for {first}"
            )


class Scorer:
    """Raw scores of answers, each component beside the weighted total."""

    def __init__(self, config, tokenizer, model: RewardModel | None, model_tokenizer=None) -> None:
        self.config, self.tokenizer, self.model = config, tokenizer, model
        # None: the reward model reads the policy's token ids as they are.
        same = model_tokenizer is None or model_tokenizer.get_vocab() == tokenizer.get_vocab()
        self.model_tokenizer = None if same else model_tokenizer
        self.functions = load_functions(config)

    def __call__(self, prompts: list, sequences: Sequences, truncated: Tensor) -> dict[str, Tensor]:
        """{"total": (S), "model": (S), function's name: (S) ...}; prompts has one for each row."""
        parts: dict[str, tuple[Tensor, float]] = {}
        weight = self.config.reward.model_weight
        if self.model is not None and weight:
            read = (
                sequences
                if self.model_tokenizer is None
                else self._retokenised(sequences, truncated)
            )
            with parallel.autocast(self.config.model.dtype):
                (scores,) = forward_all(
                    lambda batch: (self.model(batch),),
                    read,
                    self.config.trainer.tokens_per_microbatch,
                )
            parts["model"] = (scores, weight)
        if self.functions:
            texts = self.tokenizer.batch_decode(sequences.answers(), skip_special_tokens=True)
            for name, (function, weight) in self.functions.items():
                mine = parallel.share(len(texts))  # each answer is judged on one rank
                some = prompts[mine]
                scores = torch.zeros(len(texts))
                scores[mine] = function([p.text for p in some], texts[mine], [p.meta for p in some])
                parts[name] = (parallel.all_sum(scores.to(sequences.tokens.device)), weight)
        total = -self.config.reward.truncated_penalty * truncated.float()
        for scores, weight in parts.values():
            total = total + weight * scores
        return {"total": total, **{name: scores for name, (scores, _) in parts.items()}}

    def _retokenised(self, sequences: Sequences, truncated: Tensor) -> Sequences:
        """The same texts in the reward model's own tokens."""
        prompts = [
            row[:n] for row, n in zip(sequences.tokens.tolist(), sequences.prompt_lengths.tolist())
        ]
        theirs = self.model_tokenizer

        def translate(rows: list[list[int]], **options) -> list[list[int]]:
            texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            return theirs(texts, **options)["input_ids"]

        eos = [theirs.eos_token_id] if theirs.eos_token_id is not None else []
        answers = [
            ids + (eos if ended else [])
            for ids, ended in zip(
                translate(sequences.answers(), add_special_tokens=False), (~truncated).tolist()
            )
        ]
        return Sequences.of(translate(prompts), answers, theirs.pad_token_id or 0)


class Normaliser:
    """Divides by the running standard deviation of all scores so far, then clips."""

    def __init__(self, config) -> None:
        self.config = config
        zero = torch.zeros(1, device=parallel.device())
        self.stats = gikernels.GroupStats(zero, zero, zero)

    def observe(self, scores: Tensor) -> None:
        ids = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
        self.stats = gikernels.merge_stats(self.stats, gikernels.group_stats(scores, ids, 1))

    @property
    def std(self) -> Tensor:  # ()
        count, _, m2 = (x[0] for x in self.stats)
        std = (m2 / (count - 1).clamp(min=1)).sqrt()
        return torch.where(std > 0, std, 1)

    @property
    def scale(self) -> Tensor:  # () what scores are divided by
        return torch.ones_like(self.std) if self.config.reward.normalise == "none" else self.std

    def __call__(self, scores: Tensor) -> Tensor:
        if self.config.reward.normalise == "meanstd":
            scores = scores - self.stats.mean[0]
        scores = scores / self.scale
        clip = self.config.reward.clip
        return scores.clamp(-clip, clip) if clip else scores

    def state_dict(self) -> dict:
        return {"stats": torch.stack(self.stats)}

    def load_state_dict(self, state: dict) -> None:
        self.stats = gikernels.GroupStats(*state["stats"])
