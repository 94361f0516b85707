"""Prompts, demonstrations and pairs, from the built-in world or from data as people have it.

    load_prompts(config, "train", tokenizer)      list of Prompt          ("eval", "ood" likewise)
    load_demonstrations(config, tokenizer)        list of (prompt ids, answer ids)
    load_pairs(config, tokenizer)                 list of Pair

Answers end in EOS. A row may have its prompt as text or as messages, its answers likewise, with or
without the prompt in front; Anthropic HH's dialogues and the several forms of TL;DR load as they
are. What is wrong with a row is a DataError of one line: file:line, then the column.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from trainer.batch.types import Pair, Prompt
from trainer.config import Config
from trainer.data.encode import check_tokenizer, encode_answers, encode_prompts, fits
from trainer.data.errors import DataError
from trainer.data.files import read_rows
from trainer.data.formats import demonstration_of, number, pair_of, pick, prompt_of
from trainer.worlds import registry
from trainer.worlds.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
log = logging.getLogger(__name__)
SOURCES = {"train": "prompts", "eval": "eval_prompts", "ood": "ood_prompts"}


def load_prompts(config: Config, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of `split`, train, eval or ood; [] where the configuration names none."""
    key = SOURCES[split]
    source = getattr(config.data, key)
    limit = config.data.limit if split == "train" else config.data.eval_limit
    if source == "":
        return []
    if registry.is_world(source):
        world = _world(source, config, key, tokenizer)
        n = world.size(split, config.eval.samples_per_domain)
        return world.prompts(min(n, limit or n), split)

    check_tokenizer(tokenizer, config.model.policy)
    rows = list(read_rows(source, key, limit))
    parts = [prompt_of(row, config.data.columns, where) for where, row in rows]
    prompts = []
    for (where, row), (text, ids) in zip(rows, encode_prompts(parts, rows, config, tokenizer)):
        if fits(ids, config.data.max_prompt_tokens, "prompt", where, config):
            domain = pick(row, config.data.columns.domain)
            domain = None if domain is None else str(domain)
            prompts.append(Prompt(ids=ids, text=text, domain=domain, meta=row))
    return _some(prompts, len(rows), key, source)


def load_demonstrations(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    key, source = "demonstrations", config.data.demonstrations
    if registry.is_world(source):
        world = _world(source, config, key, tokenizer)
        n = world.size("demonstrations", 0)
        return world.demonstrations(min(n, config.data.limit or n))

    check_tokenizer(tokenizer, config.model.policy)
    rows = list(read_rows(source, key, config.data.limit))
    parts = [demonstration_of(row, config.data.columns, where) for where, row in rows]
    prompts = encode_prompts([prompt for prompt, _ in parts], rows, config, tokenizer)
    answers = encode_answers([answer for _, answer in parts], config, tokenizer)
    out = []
    for (where, _), (_, prompt), answer in zip(rows, prompts, answers):
        if fits(prompt, config.data.max_prompt_tokens, "prompt", where, config) and fits(
            answer, config.data.max_answer_tokens, "answer", where, config
        ):
            out.append((prompt, answer))
    return _some(out, len(rows), key, source)


def load_pairs(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    key, source = "pairs", config.data.pairs
    if registry.is_world(source):
        raise ValueError(f"the pairs of world {source} are sampled from the SFT model, in stage rm")

    check_tokenizer(tokenizer, config.model.policy)
    columns = config.data.columns
    rows = list(read_rows(source, key, config.data.limit))
    parts = [pair_of(row, columns, where) for where, row in rows]
    prompts = encode_prompts([prompt for prompt, _, _ in parts], rows, config, tokenizer)
    chosen = encode_answers([better for _, better, _ in parts], config, tokenizer)
    rejected = encode_answers([worse for _, _, worse in parts], config, tokenizer)
    pairs, same = [], 0
    for (where, row), (_, prompt), better, worse in zip(rows, prompts, chosen, rejected):
        if better == worse:  # HH has a few; they teach nothing
            same += 1
        elif fits(prompt, config.data.max_prompt_tokens, "prompt", where, config) and all(
            fits(answer, config.data.max_answer_tokens, "answer", where, config)
            for answer in (better, worse)
        ):
            pairs.append(
                Pair(
                    prompt_ids=prompt,
                    chosen_ids=better,
                    rejected_ids=worse,
                    margin=number(row, columns.margin, where),
                    rating_chosen=number(row, f"{columns.rating}_chosen", where),
                    rating_rejected=number(row, f"{columns.rating}_rejected", where),
                )
            )
    if same:
        log.warning("data.pairs: %s: left out %d pairs of two equal answers", source, same)
    return _some(pairs, len(rows) - same, key, source)


def _some(kept: list[T], rows: int, key: str, source: str) -> list[T]:
    if not kept:
        raise DataError(f"data.{key}: {source}: no row is left of {rows}")
    if len(kept) < rows:
        log.warning(
            "data.%s: %s: left out %d of %d rows, too long", key, source, rows - len(kept), rows
        )
    return kept


def _world(source: str, config: Config, key: str, tokenizer: PreTrainedTokenizerBase) -> World:
    world = registry.world(source, config)
    if not world.speaks(tokenizer):
        raise DataError(
            f"data.{key}: {source} wants the {source} world's tokenizer, and model.policy="
            f"{config.model.policy} has another"
        )
    return world
