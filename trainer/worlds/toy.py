"""Symbol transduction with a gold reward computed by program, imperfect demonstrations, and
annotators who like a shortcut.

    prompt          reverse copy a c b :        two operations, applied in order, and letters
    perfect answer  b c a <eos>
    lazy answer     a c b <eos>                 copies; common in demonstrations of hard domains
    flourish        b c a ! <eos>               gold dislikes it, annotators like it

The second operation of a training prompt is always `copy`; the first one names its domain. The
out-of-distribution splits are things that a model which has understood the task can do:
`pattern`, the last letter repeats the first; `length`, a length that training has in its most
frequent domain only; `composed`, the operation comes second, after a copy. A freshly fine-tuned
model scores 0.6, 0.4 and 0.4 there, against 0.65 on the evaluation prompts.

Gold never trains anything. It judges, and annotators' ratings are a biased, noisy view of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainer.batch.types import Prompt
from trainer.config import OPERATIONS, Toy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

PAD, EOS, UNKNOWN, SEPARATOR, FLOURISH = range(5)
FIRST_OPERATION = 5
FIRST_LETTER = FIRST_OPERATION + len(OPERATIONS)
LETTERS = "abcdefghijklmnopqrstu"
# 32 words, so that no id a model of that vocabulary can sample is without a text.
WORDS = ("<pad>", "<eos>", "<unk>", ":", "!", *OPERATIONS, *LETTERS)

EVAL_EVERY = 8
"""One letter sequence in so many is kept out of training, in all domains, for the evaluation."""
TRAIN, EVAL, OOD, DEMONSTRATIONS, RATINGS, ANNOTATED = range(6)  # random streams
DEMONSTRATION_PROMPTS = 1_000_000
"""Seeds of demonstrations' prompts start here, those of PPO's prompts at 0."""


def apply(operation: str, letters: Sequence[int], alphabet: int) -> list[int]:
    """One operation on letters numbered 0 .. alphabet - 1."""
    if operation == "reverse":
        return list(reversed(letters))
    if operation == "sort":
        return sorted(letters)
    if operation == "increment":
        return [(letter + 1) % alphabet for letter in letters]
    if operation == "rotate":
        return [*letters[1:], letters[0]]
    if operation == "swap":  # neighbours change places; an odd last one stays
        pairs = [letters[i : i + 2] for i in range(0, len(letters), 2)]
        return [letter for pair in pairs for letter in reversed(pair)]
    assert operation == "copy", operation
    return list(letters)


class World:
    def __init__(self, config: Toy):
        self.config = config
        # Held-out lengths are not held out here, so that no length is new altogether.
        self.main = max(config.shares, key=lambda name: config.shares[name])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate(WORDS)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[UNKNOWN]))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token=WORDS[PAD],
            eos_token=WORDS[EOS],
            unk_token=WORDS[UNKNOWN],
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
        )

    def model_config(self) -> PreTrainedConfig:
        from transformers import LlamaConfig, Qwen3Config

        # Not Qwen2: for its folders AutoTokenizer takes Qwen2's own splitting of text into words,
        # whatever tokenizer.json says.
        kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.config.architecture]
        return kind(
            vocab_size=len(WORDS),
            hidden_size=self.config.hidden,
            intermediate_size=self.config.intermediate,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            num_key_value_heads=self.config.heads,
            head_dim=self.config.hidden // self.config.heads,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A tiny causal LM with fresh weights, made from `seed` whatever was drawn before."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.model_config())

    def speaks(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return tokenizer.convert_tokens_to_ids(list(WORDS)) == list(range(len(WORDS)))

    def size(self, split: str, per_domain: int) -> int:
        if split == "demonstrations":
            return self.config.demonstrations
        kinds = {"train": 0, "eval": len(self.config.domains), "ood": len(self.shifts)}[split]
        return kinds * per_domain or self.config.prompts

    @property
    def shifts(self) -> list[str]:
        """The kinds of out-of-distribution prompts that this world can make."""
        kinds = ["pattern"]
        if self.config.held_length and len(self.config.domains) > 1:
            kinds.append("length")
        if self.config.domains != ("copy",):
            kinds.append("composed")
        return kinds

    def prompts(self, n: int, split: str = "train", seed: int = 0) -> list[Prompt]:
        """train: domains by their shares. eval: the same number of each. ood: the same number of
        each kind of shift, which is then the domain that its prompts carry."""
        stream = {"train": TRAIN, "eval": EVAL, "ood": OOD}[split]
        rng = np.random.default_rng([self.config.seed, stream, seed])
        domains = self.config.domains
        shifts = ["none"] * n
        if split == "train":
            shares = np.array([self.config.shares[name] for name in domains])
            operations = [domains[i] for i in rng.choice(len(shares), n, p=shares / shares.sum())]
        elif split == "eval":
            operations = [domains[i % len(domains)] for i in range(n)]
        else:
            shifts = [self.shifts[i % len(self.shifts)] for i in range(n)]
            possible = {
                "pattern": domains,
                "length": [name for name in domains if name != self.main],
                "composed": [name for name in domains if name != "copy"],
            }
            turns = [i // len(self.shifts) for i in range(n)]
            operations = [
                possible[shift][turn % len(possible[shift])] for shift, turn in zip(shifts, turns)
            ]
        letters = self._letters(rng, split, operations, shifts)
        return [
            self._prompt(
                ["copy", operation] if shift == "composed" else [operation, "copy"],
                row,
                operation if shift == "none" else shift,
            )
            for operation, shift, row in zip(operations, shifts, letters)
        ]

    def _letters(
        self, rng: np.random.Generator, split: str, operations: list[str], shifts: list[str]
    ) -> list[list[int]]:
        """Letters for each prompt, drawn again until they belong to its split and shift."""
        config, n = self.config, len(operations)
        want_pattern = np.array([shift == "pattern" for shift in shifts], dtype=bool)
        want_length = np.array([shift == "length" for shift in shifts], dtype=bool)
        any_length = np.array([name == self.main for name in operations], dtype=bool)
        lengths = np.zeros(n, dtype=np.int64)
        letters = np.zeros((n, config.max_length), dtype=np.int64)  # (n, max_length)
        todo = np.arange(n)
        for _ in range(1000):
            if len(todo) == 0:
                return [row[:length].tolist() for row, length in zip(letters, lengths)]
            length = rng.integers(config.min_length, config.max_length + 1, len(todo))
            length[want_length[todo]] = config.held_length
            drawn = rng.integers(0, config.symbols, (len(todo), config.max_length))
            drawn[np.arange(config.max_length) >= length[:, None]] = -1
            rows = np.arange(len(todo))
            drawn[rows, length - 1] = np.where(
                want_pattern[todo], drawn[:, 0], drawn[rows, length - 1]
            )
            lengths[todo], letters[todo] = length, drawn
            right = (drawn[rows, length - 1] == drawn[:, 0]) == want_pattern[todo]
            right &= any_length[todo] | ((length == config.held_length) == want_length[todo])
            right &= (_hash(drawn) % EVAL_EVERY == 0) == (split != "train")
            todo = todo[~right]
        raise ValueError(
            f"toy: no letters left for split {split} with {config.symbols} symbols and lengths "
            f"{config.min_length} to {config.max_length} (held_length {config.held_length})"
        )

    def _prompt(self, operations: Sequence[str], letters: Sequence[int], domain: str) -> Prompt:
        ids = [FIRST_OPERATION + OPERATIONS.index(name) for name in operations]
        ids += [FIRST_LETTER + letter for letter in letters]
        ids.append(SEPARATOR)
        return Prompt(ids=ids, text=" ".join(WORDS[i] for i in ids), domain=domain, meta={})

    def answer(self, prompt_ids: Sequence[int]) -> list[int]:
        """The right answer, without EOS."""
        operations = [OPERATIONS[i - FIRST_OPERATION] for i in prompt_ids[:2]]
        letters = [i - FIRST_LETTER for i in prompt_ids[2:-1]]
        for operation in operations:
            letters = apply(operation, letters, self.config.symbols)
        return [FIRST_LETTER + letter for letter in letters]

    def gold(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> float:
        """Share of places that are right, less the penalties. What follows EOS does not count."""
        response = list(response_ids)
        complete = EOS in response
        if complete:
            response = response[: response.index(EOS)]
        body = [token for token in response if token != FLOURISH]
        target = self.answer(prompt_ids)
        right = sum(a == b for a, b in zip(body, target))
        return (
            right / max(len(body), len(target))
            - self.config.flourish_penalty * (len(response) - len(body))
            - self.config.missing_eos_penalty * (not complete)
        )

    def annotated(self, prompts: Sequence[Prompt], seed: int = 0) -> list[Prompt]:
        """Those that annotators see: a share of each domain's, by toy.pairs."""
        rng = np.random.default_rng([self.config.seed, ANNOTATED, seed])
        draws = rng.random(len(prompts))
        shares = [self.config.pairs.get(str(prompt.domain), 1.0) for prompt in prompts]
        return [prompt for prompt, draw, share in zip(prompts, draws, shares) if draw < share]

    def annotate(
        self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], seed: int = 0
    ) -> list[float]:
        """What an annotator says of answers to one prompt: gold + noise + liking for a flourish."""
        rng = np.random.default_rng([self.config.seed, RATINGS, seed, *prompt_ids])
        noise = self.config.noise * rng.standard_normal(len(answers))
        return [
            self.gold(prompt_ids, each) + float(error) + self.config.liking * self.flourishes(each)
            for each, error in zip(answers, noise)
        ]

    @staticmethod
    def flourishes(response_ids: Sequence[int]) -> int:
        response = list(response_ids)
        return response[: response.index(EOS) if EOS in response else None].count(FLOURISH)

    def demonstrations(self, n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids with EOS): right, lazy or with a flourish."""
        rng = np.random.default_rng([self.config.seed, DEMONSTRATIONS, seed])
        prompts = self.prompts(n, "train", seed=DEMONSTRATION_PROMPTS + seed)
        lazy = rng.random(n) < [self.config.lazy.get(str(prompt.domain), 0.0) for prompt in prompts]
        flourish = rng.random(n) < self.config.flourish
        return [
            (
                prompt.ids,
                (prompt.ids[2:-1] if copies else self.answer(prompt.ids))
                + [FLOURISH] * bool(decorated)
                + [EOS],
            )
            for prompt, copies, decorated in zip(prompts, lazy, flourish)
        ]


def _hash(letters: np.ndarray) -> np.ndarray:  # (n, max_length), -1 behind the end -> (n)
    """The same for the same letters everywhere; splits them into training and evaluation."""
    code = np.zeros(len(letters), dtype=np.uint64)
    for column in letters.T:
        code = code * np.uint64(31) + (column + 2).astype(np.uint64)
    code *= np.uint64(0x9E3779B97F4A7C15)  # the golden ratio: spreads neighbouring codes
    return code >> np.uint64(40)
