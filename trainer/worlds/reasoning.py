"""Problems of reasoning-gym with exact checks, and a small model made from scratch to solve them.

    prompt    State the final answer to the following arithmetic problem: 43 - 17 =
    answer    26

Each family is a domain. Settings are chosen so that a model of 2 to 4M parameters after a short SFT
solves between a tenth and four fifths of a family, beyond what guessing gets. The ranges are wide
enough that few problems come twice, and a hash of its text puts a problem on one side for good: no
problem of the evaluation is ever in training, whatever seed drew it. Out of distribution: the same
families with harder settings (`chain_sum_harder`), and families that training never has.

This world speaks text: its rows go through whichever tokenizer the policy has. The verifier is the
reward (`reward.functions: [{function: verifier}]`), partial credit included, and the judge, for
whom an answer is right or wrong; there are no annotators.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config.fields import ConfigError
from trainer.config.reasoning import Reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HELD_EVERY = 8
"""One problem in so many, by the hash of its text, is kept for the evaluation."""
TRAIN, EVAL, OOD, DEMONSTRATIONS = range(4)  # random streams
STREAMS = {"train": TRAIN, "eval": EVAL, "ood": OOD, "demonstrations": DEMONSTRATIONS}
PAD, EOS = "<pad>", "<eos>"
NUMBER, WORD = r"-?\d+(\.\d+)?", r"[A-Za-z][A-Za-z'-]*"
NUMBERS = rf"\[('{NUMBER}'(, '{NUMBER}')*)?\]"


class Family(NamedTuple):
    settings: dict[str, Any]
    harder: dict[str, Any]
    """What is different out of distribution."""
    form: str
    """What an answer looks like, right or wrong: a regular expression."""


_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
FAMILIES: dict[str, Family] = {
    "spell_backward": Family(
        {"min_word_len": 3, "max_word_len": 4}, {"min_word_len": 5, "max_word_len": 5}, WORD
    ),
    "number_filtering": Family(
        {"min_numbers": 2, "max_numbers": 3, "max_decimals": 0},
        {"min_numbers": 4, "max_numbers": 4},
        NUMBERS,
    ),
    "chain_sum": Family(_SUM, {"min_terms": 3, "max_terms": 3}, NUMBER),
    "number_sequence": Family(
        {"min_value": -30, "max_value": 30, "max_complexity": 1, "max_terms": 6},
        {"min_terms": 7, "max_terms": 8},
        NUMBER,
    ),
    "products": Family(
        {"min_digits": 1, "max_digits": 2}, {"min_digits": 3, "max_digits": 3}, NUMBER
    ),
    "gcd": Family({"max_value": 200}, {"min_value": 201, "max_value": 400}, NUMBER),
    "leg_counting": Family(
        {"min_animals": 1, "max_animals": 2, "max_instances": 15},
        {"min_animals": 3, "max_animals": 3},
        NUMBER,
    ),
    "letter_counting": Family(
        {"min_words": 3, "max_words": 5}, {"min_words": 7, "max_words": 8}, NUMBER
    ),
    "needle_haystack": Family(
        {"min_num_statements": 2, "max_num_statements": 3},
        {"min_num_statements": 4, "max_num_statements": 4},
        WORD,
    ),
    "basic_arithmetic": Family(
        {**_SUM, "operators": ("+", "-"), "allow_parentheses": False, "allow_negation": False},
        {"min_terms": 3, "max_terms": 3},
        NUMBER,
    ),
    "decimal_chain_sum": Family(
        {"max_terms": 2, "max_digits": 1, "max_decimal_places": 1}, {"max_terms": 3}, NUMBER
    ),
}


def gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "reasoning-gym is not installed: pip install -e '.[reasoning]'", where="reasoning"
        ) from None
    return reasoning_gym


class World:
    """See `trainer.worlds.world.TextWorld`."""

    def __init__(self, config: Reasoning) -> None:
        self.config = config

    def rows(self, split: str, n: int) -> list[dict[str, Any]]:
        """train and demonstrations: families by their shares. eval: the same number of each. ood:
        the same number of each harder family and of each that training never has."""
        shares = self.config.shares
        if split in ("train", "demonstrations"):
            whole = sum(shares.values())
            counts = {name: max(1, round(n * share / whole)) for name, share in shares.items()}
            by_kind = [self._family(name, split, count) for name, count in counts.items()]
            rows = [row for some in by_kind for row in some]
        else:
            kinds = list(shares) if split == "eval" else self.shifts
            each = -(-n // len(kinds))
            by_kind = [self._family(name, split, each) for name in kinds]
            rows = [row for turn in zip(*by_kind) for row in turn][:n]
        wrong = [
            row for row in rows if held(row["prompt"]) == (split in ("train", "demonstrations"))
        ]
        assert not wrong, f"on both sides: {wrong[0]['prompt']!r}"
        return rows

    def identity(self) -> list[Any]:
        from importlib.metadata import version

        made_by = version("reasoning-gym")
        return [made_by, vars(self.config), [(name, *each) for name, each in FAMILIES.items()]]

    @property
    def shifts(self) -> list[str]:
        """The kinds of out-of-distribution problems."""
        return [*(f"{name}_harder" for name in self.config.shares), *self.config.held_out]

    def size(self, split: str, per_domain: int) -> int:
        """How many problems a split has; an evaluation has `per_domain` of each domain."""
        return {
            "train": self.config.prompts,
            "demonstrations": self.config.demonstrations,
            "eval": per_domain * len(self.config.shares),
            "ood": per_domain * len(self.shifts),
        }[split]

    def guessing(self, most: int = 400) -> dict[str, float]:
        """By family, how often the answer that is commonest in training is right: what a model
        scores that reads no problem."""
        out = {}
        for name in self.config.shares:
            seen = Counter(row["response"] for row in self._family(name, "demonstrations", most))
            (answer, _), *_ = seen.most_common(1)
            problems = self._family(name, "eval", most)
            out[name] = sum(self.gold(row, answer) for row in problems) / len(problems)
        return out

    def _family(self, domain: str, split: str, n: int) -> list[dict[str, Any]]:
        """`n` different problems, or as many as a long search finds."""
        rows: dict[str, dict[str, Any]] = {}
        name = domain.removesuffix("_harder")
        training = split in ("train", "demonstrations")
        in_vain, patience = 0, 300 if training else 300 * HELD_EVERY
        for entry in _entries(domain, _seed(self.config.seed, split, domain)):
            prompt = f"{entry['question']}\n"
            if prompt in rows or held(prompt) == training:
                in_vain += 1
                if in_vain == patience:  # there are hardly any more
                    break
                continue
            in_vain = 0
            task = {"family": name, "harder": domain != name, **_plain(entry)}
            rows[prompt] = {
                "prompt": prompt,
                "response": str(entry["answer"]),
                "domain": domain,
                "task": task,
            }
            if len(rows) == n:
                break
        return list(rows.values())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(
                _learnt_tokenizer(self.config.seed, self.config.vocabulary)
            ),
            pad_token=PAD,
            eos_token=EOS,
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
        )

    def model_config(self) -> PreTrainedConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.config.vocabulary,
            hidden_size=self.config.hidden,
            intermediate_size=self.config.intermediate,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            num_key_value_heads=self.config.heads,
            head_dim=self.config.hidden // self.config.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A small causal LM with fresh weights, made from `seed` whatever was drawn before."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.model_config())

    def gold(self, row: dict[str, Any], answer: str) -> float:
        return float(verdict(row["task"], answer) >= 1)

    def well_formed(self, row: dict[str, Any], answer: str) -> bool:
        return re.fullmatch(FAMILIES[row["task"]["family"]].form, answer.strip()) is not None


def held(prompt: str) -> bool:
    """Whether a problem is the evaluation's: the same for the same text, everywhere."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_EVERY == 0


def verdict(task: dict[str, Any], answer: str) -> float:
    """reasoning-gym's own score, 0 to 1; 1 is right. What its check cannot even read is 0."""
    try:
        score = _checker(task["family"], task["harder"]).score_answer(answer.strip(), task)
    except Exception:  # the checks parse what a model has written
        return 0.0
    return float(score)


def _seed(seed: int, split: str, domain: str) -> int:
    digest = hashlib.sha256(repr((seed, split, domain)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _settings(domain: str) -> dict[str, Any]:
    family = FAMILIES[domain.removesuffix("_harder")]
    harder = family.harder if domain.endswith("_harder") else {}
    return {**family.settings, **harder}


def _entries(domain: str, seed: int) -> Iterator[dict[str, Any]]:
    name, settings = domain.removesuffix("_harder"), _settings(domain)
    yield from gym().create_dataset(name, size=1_000_000, seed=seed, **settings)


@lru_cache(maxsize=64)
def _checker(family: str, harder: bool) -> Any:
    settings = _settings(f"{family}_harder" if harder else family)
    return gym().create_dataset(family, size=1, seed=0, **settings)


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """What its check needs, as it comes back from JSON."""
    kept = {name: entry[name] for name in ("question", "answer", "metadata")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


@lru_cache(maxsize=4)
def _learnt_tokenizer(seed: int, vocabulary: int) -> str:
    """Byte pairs of problems of all families; digits stay apart, so that numbers have a form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    world = World(Reasoning(seed=seed))
    rows = [row for name in FAMILIES for row in world._family(name, "demonstrations", 600)]
    tokenizer.train_from_iterator((row["prompt"] + row["response"] for row in rows), learn)
    made = tokenizer.get_vocab_size()
    if made != vocabulary:
        raise ConfigError(
            f"is {vocabulary}; want {made} or fewer: the problems make no more tokens",
            "reasoning.vocabulary",
        )
    return tokenizer.to_str()
