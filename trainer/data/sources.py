"""Prompts, demonstrations and pairs, from the built-in world or from data as people have it.

    load_prompts(config, "train", tokenizer)      Prompts                 ("eval", "ood" likewise)
    load_demonstrations(config, tokenizer)        (prompt ids, answer ids)
    load_pairs(config, tokenizer)                 Pairs

Answers end in EOS. A row may have its prompt as text or as messages, its answers likewise, with or
without the prompt in front; Anthropic HH's dialogues and the several forms of TL;DR load as they
are. What is wrong with a row is a DataError of one line: file:line, then the column. Several
sources stand one behind the other and are mixed by their weights when batches are drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from trainer.batch.types import Pair, Prompt
from trainer.config import Config, Source
from trainer.data import cache, rows
from trainer.data.encode import check_tokenizer, encode_answers, encode_prompts, fits, shortened
from trainer.data.errors import DataError
from trainer.data.files import read_rows, state
from trainer.data.formats import demonstration_of, number, pair_of, pick, prompt_of
from trainer.data.rows import Rows
from trainer.worlds import registry
from trainer.worlds.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
SOURCES = {"train": "prompts", "eval": "eval_prompts", "ood": "ood_prompts"}
SPLITS = {**{key: split for split, key in SOURCES.items()}, "demonstrations": "demonstrations"}
# Settings that rows depend on, beside their source.
WORD_FOR_WORD = (
    *("columns", "max_prompt_tokens", "max_answer_tokens", "too_long", "parse_dialogues"),
    *("as_messages", "system_prompt", "template_kwargs"),
)
# (rows of one source, how many there were before some were left out, pairs of two equal answers)
Made = tuple[list[Any], int, int]


def load_prompts(
    config: Config, split: str, tokenizer: PreTrainedTokenizerBase
) -> Sequence[Prompt]:
    """The prompts of `split`, train, eval or ood; none where the configuration names no source."""
    key = SOURCES[split]
    source = getattr(config.data, key)
    limit = config.data.limit if split == "train" else config.data.eval_limit
    if source == "":
        return []
    if registry.has_ids(source):
        world = _world(source, config, key, tokenizer)
        n = world.size(split, config.eval.samples_per_domain)
        return world.prompts(min(n, limit or n), split)
    return _rows(config, tokenizer, key, limit, rows.PROMPTS, _prompts)


def load_demonstrations(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> Sequence[rows.Demonstration]:
    key, source = "demonstrations", config.data.demonstrations
    if registry.has_ids(source):
        world = _world(source, config, key, tokenizer)
        n = world.size("demonstrations", 0)
        return world.demonstrations(min(n, config.data.limit or n))
    return _rows(config, tokenizer, key, config.data.limit, rows.DEMONSTRATIONS, _demonstrations)


def load_pairs(config: Config, tokenizer: PreTrainedTokenizerBase) -> Sequence[Pair]:
    source = config.data.pairs
    if registry.is_world(source):
        raise ValueError(f"the pairs of world {source} are sampled from the SFT model, in stage rm")
    return _rows(config, tokenizer, "pairs", config.data.limit, rows.PAIRS, _pairs)


def _rows(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    limit: int,
    kind: rows.Kind,
    make: Callable[[Config, PreTrainedTokenizerBase, Source, str, int], Made],
) -> Rows[Any]:
    check_tokenizer(tokenizer, config.model.policy)
    folder, words = cache.folder(config), None
    tables, sources = [], config.data.sources(key)
    for source in sources:

        def table(source: Source = source) -> pa.Table:
            kept, before, same = make(config, tokenizer, source, key, limit)
            if not kept:
                raise DataError(f"data.{key}: {source.source}: no row is left of {before}")
            left_out = {"rows": before, "kept": len(kept), "same": same}
            return rows.table(kind, kept, left_out)

        name = ""
        if folder is not None:
            words = words or cache.tokenizer_hash(tokenizer)
            settings = {k: str(v) for k, v in vars(config.data).items() if k in WORD_FOR_WORD}
            alone = isinstance(getattr(config.data, key), str)
            name = cache.key(
                kind.name,
                _state(config, source.source, key),
                vars(source),
                alone,
                limit,
                settings,
                words,
            )
        loaded = cache.cached(folder, name, table)
        _say_what_is_left_out(rows.counts(loaded), key, source.source)
        tables.append(loaded)
    return Rows.of(tables, [source.weight for source in sources], kind)


def _prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, key: str, limit: int
) -> Made:
    data, columns = config.data, config.data.columns_of(source)
    several = not isinstance(getattr(data, key), str)
    read = _read(config, source.source, key, limit)
    parts = [prompt_of(row, columns, where) for where, row in read]
    prompts = []
    for (where, row), encoded in zip(read, encode_prompts(parts, read, config, tokenizer)):
        encoded = shortened(encoded, config, tokenizer)
        if fits(encoded.ids, data.max_prompt_tokens, "prompt", where, config):
            domain = source.domain or pick(row, columns.domain)
            if domain is None and several:
                domain = source.label
            prompts.append(
                Prompt(
                    ids=encoded.ids,
                    text=encoded.text,
                    domain=None if domain is None else str(domain),
                    messages=encoded.messages,
                    meta=row,
                )
            )
    return prompts, len(read), 0


def _demonstrations(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, key: str, limit: int
) -> Made:
    columns = config.data.columns_of(source)
    read = _read(config, source.source, key, limit)
    parts = [demonstration_of(row, columns, where) for where, row in read]
    prompts = encode_prompts([prompt for prompt, _ in parts], read, config, tokenizer)
    answers = encode_answers([answer for _, answer in parts], config, tokenizer)
    out = []
    for (where, _), prompt, answer in zip(read, prompts, answers):
        prompt = shortened(prompt, config, tokenizer)
        if fits(prompt.ids, config.data.max_prompt_tokens, "prompt", where, config) and fits(
            answer, config.data.max_answer_tokens, "answer", where, config
        ):
            out.append((prompt.ids, answer))
    return out, len(read), 0


def _pairs(
    config: Config, tokenizer: PreTrainedTokenizerBase, source: Source, key: str, limit: int
) -> Made:
    columns = config.data.columns_of(source)
    read = _read(config, source.source, key, limit)
    parts = [pair_of(row, columns, where) for where, row in read]
    prompts = encode_prompts([prompt for prompt, _, _ in parts], read, config, tokenizer)
    chosen = encode_answers([better for _, better, _ in parts], config, tokenizer)
    rejected = encode_answers([worse for _, _, worse in parts], config, tokenizer)
    pairs, same = [], 0
    for (where, row), prompt, better, worse in zip(read, prompts, chosen, rejected):
        prompt = shortened(prompt, config, tokenizer)
        if better == worse:  # HH has a few; they teach nothing
            same += 1
        elif fits(prompt.ids, config.data.max_prompt_tokens, "prompt", where, config) and all(
            fits(answer, config.data.max_answer_tokens, "answer", where, config)
            for answer in (better, worse)
        ):
            pairs.append(
                Pair(
                    prompt_ids=prompt.ids,
                    chosen_ids=better,
                    rejected_ids=worse,
                    margin=number(row, columns.margin, where),
                    rating_chosen=number(row, f"{columns.rating}_chosen", where),
                    rating_rejected=number(row, f"{columns.rating}_rejected", where),
                )
            )
    return pairs, len(read) - same, same


def _read(config: Config, source: str, key: str, limit: int) -> list[tuple[str, dict[str, Any]]]:
    if not registry.is_text_world(source):
        return list(read_rows(source, key, limit))
    world, split = registry.text_world(source, config), SPLITS[key]
    n = world.size(split, config.eval.samples_per_domain)
    rows = world.rows(split, min(n, limit or n))
    return [(f"{source}: row {i}", row) for i, row in enumerate(rows)]


def _state(config: Config, source: str, key: str) -> list[Any]:
    """What changes when the rows of a source do."""
    if registry.is_text_world(source):
        world = registry.text_world(source, config)
        return [*world.identity(), world.size(SPLITS[key], config.eval.samples_per_domain)]
    return state(source, key)


def _say_what_is_left_out(counts: dict[str, int], key: str, source: str) -> None:
    before, kept = counts["rows"], counts["kept"]
    if counts["same"]:
        log.warning("data.%s: %s: left out %d pairs of two equal answers", key, source,
                    counts["same"])  # fmt: skip
    if kept < before:
        log.warning(
            "data.%s: %s: left out %d of %d rows, too long", key, source, before - kept, before
        )


def _world(source: str, config: Config, key: str, tokenizer: PreTrainedTokenizerBase) -> World:
    world = registry.world(source, config)
    if not world.speaks(tokenizer):
        raise DataError(
            f"data.{key}: {source} wants the {source} world's tokenizer, and model.policy="
            f"{config.model.policy} has another"
        )
    return world
