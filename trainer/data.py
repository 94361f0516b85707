"""Prompts, demonstrations and pairs, from the built-in world or from data as people have it.

    load_prompts(config, "train", tokenizer)      list of Prompt          ("eval", "ood" likewise)
    load_demonstrations(config, tokenizer)        list of (prompt ids, answer ids)
    load_pairs(config, tokenizer)                 list of Pair

Answers end in EOS. A row may have its prompt as text or as messages, its answers likewise, with or
without the prompt in front; Anthropic HH's dialogues and the several forms of TL;DR load as they
are. What is wrong with a row is a DataError of one line: file:line, then the column.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Columns, Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
SOURCES = {"train": "prompts", "eval": "eval_prompts", "ood": "ood_prompts"}
FILES = (".jsonl", ".jsonl.gz", ".parquet")
RESPONSES = ("response", "completion", "label")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class DataError(ValueError):
    """One line that names the file and line (or the setting), the column, and what is wrong."""

    for_user = True


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: list[int]
    text: str
    domain: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """The whole row it came from, for reward functions."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None
    rating_chosen: float | None = None
    rating_rejected: float | None = None


def load_prompts(config: Config, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of `split`, train, eval or ood; [] where the configuration names none."""
    key = SOURCES[split]
    source = getattr(config.data, key)
    limit = config.data.limit if split == "train" else config.data.eval_limit
    if source == "":
        return []
    if source == "toy":
        world = _toy_world(config, key, tokenizer)
        kinds = {"train": [], "eval": config.toy.domains, "ood": world.shifts}[split]
        n = len(kinds) * config.eval.samples_per_domain or config.toy.prompts
        return world.prompts(min(n, limit or n), split)

    check_tokenizer(tokenizer, config.model.policy)
    rows = list(_rows(source, key, limit))
    parts = [prompt_of(row, config.data.columns, where) for where, row in rows]
    prompts = []
    for (where, row), (text, ids) in zip(rows, _encode_prompts(parts, rows, config, tokenizer)):
        if _fits(ids, config.data.max_prompt_tokens, "prompt", where, config):
            domain = _pick(row, config.data.columns.domain)
            domain = None if domain is None else str(domain)
            prompts.append(Prompt(ids=ids, text=text, domain=domain, meta=row))
    return _some(prompts, len(rows), key, source)


def load_demonstrations(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    key, source = "demonstrations", config.data.demonstrations
    if source == "toy":
        n = config.toy.demonstrations
        return _toy_world(config, key, tokenizer).demonstrations(min(n, config.data.limit or n))

    check_tokenizer(tokenizer, config.model.policy)
    rows = list(_rows(source, key, config.data.limit))
    parts = [demonstration_of(row, config.data.columns, where) for where, row in rows]
    prompts = _encode_prompts([prompt for prompt, _ in parts], rows, config, tokenizer)
    answers = _encode_answers([answer for _, answer in parts], config, tokenizer)
    out = []
    for (where, _), (_, prompt), answer in zip(rows, prompts, answers):
        if _fits(prompt, config.data.max_prompt_tokens, "prompt", where, config) and _fits(
            answer, config.data.max_answer_tokens, "answer", where, config
        ):
            out.append((prompt, answer))
    return _some(out, len(rows), key, source)


def load_pairs(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    key, source = "pairs", config.data.pairs
    if source == "toy":
        raise ValueError("the toy world's pairs are sampled from the SFT model, in stage rm")

    check_tokenizer(tokenizer, config.model.policy)
    columns = config.data.columns
    rows = list(_rows(source, key, config.data.limit))
    parts = [pair_of(row, columns, where) for where, row in rows]
    prompts = _encode_prompts([prompt for prompt, _, _ in parts], rows, config, tokenizer)
    chosen = _encode_answers([better for _, better, _ in parts], config, tokenizer)
    rejected = _encode_answers([worse for _, _, worse in parts], config, tokenizer)
    pairs, same = [], 0
    for (where, row), (_, prompt), better, worse in zip(rows, prompts, chosen, rejected):
        if better == worse:  # HH has a few; they teach nothing
            same += 1
        elif _fits(prompt, config.data.max_prompt_tokens, "prompt", where, config) and all(
            _fits(answer, config.data.max_answer_tokens, "answer", where, config)
            for answer in (better, worse)
        ):
            pairs.append(
                Pair(
                    prompt_ids=prompt,
                    chosen_ids=better,
                    rejected_ids=worse,
                    margin=_number(row, columns.margin, where),
                    rating_chosen=_number(row, f"{columns.rating}_chosen", where),
                    rating_rejected=_number(row, f"{columns.rating}_rejected", where),
                )
            )
    if same:
        log.warning("data.pairs: %s: left out %d pairs of two equal answers", source, same)
    return _some(pairs, len(rows) - same, key, source)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for token, use in (("pad", "fill up short rows"), ("eos", "know where an answer ends")):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise DataError(
                f"model.policy: {name}: its tokenizer has no {token}_token, which is needed to "
                f"{use}; name one in its tokenizer_config.json"
            )


# What a row says, before any tokenizer. Prompts are text or messages, answers are text.


def prompt_of(row: dict[str, Any], columns: Columns, where: str) -> str | Messages:
    prompt = _pick(row, columns.prompt)
    if prompt is not None:
        return _part(prompt, columns.prompt, where)
    messages = _pick(row, columns.messages)
    if messages is not None:
        messages = _messages(messages, columns.messages, where)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if _is_tldr(row):
        return _tldr_prompt(row["info"], where)
    if _pick(row, columns.chosen) is not None:
        return (
            pair_of(row, columns, where)[0]
            if _pick(row, columns.rejected) is not None
            else _split_one(_pick(row, columns.chosen), columns.chosen, where)[0]
        )
    raise _missing(row, f"{columns.prompt} or {columns.messages}", where)


def demonstration_of(
    row: dict[str, Any], columns: Columns, where: str
) -> tuple[str | Messages, str]:
    if _is_tldr(row):
        prompt, better, _ = _tldr_pair(row, where)
        return prompt, better
    names = (columns.response,) if columns.response else RESPONSES
    response = next((name for name in names if _pick(row, name) is not None), None)
    if response is not None:
        prompt = prompt_of(row, columns, where)
        return _answer_after(prompt, _part(_pick(row, response), response, where), response, where)
    for name in (columns.messages, columns.chosen):
        if _pick(row, name) is not None:
            return _split_one(_pick(row, name), name, where)
    raise _missing(row, " or ".join([*names, columns.messages]), where)


def pair_of(row: dict[str, Any], columns: Columns, where: str) -> tuple[str | Messages, str, str]:
    """(prompt, chosen, rejected). Without a prompt column the common prefix is the prompt."""
    if _is_tldr(row):
        return _tldr_pair(row, where)
    values = []
    for name in (columns.chosen, columns.rejected):
        value = _pick(row, name)
        if value is None:
            raise _missing(row, name, where)
        values.append(_part(value, name, where))
    chosen, rejected = values
    if type(chosen) is not type(rejected):
        raise DataError(f"{where}: {columns.rejected}: want the same form as {columns.chosen}")
    prompt = _pick(row, columns.prompt)
    # Whole dialogues carry their prompt; a prompt column beside them repeats it as text.
    if isinstance(chosen, list) and len(chosen) > 1:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
    elif prompt is None:
        prompt = "" if isinstance(chosen, list) else _common_prefix(chosen, rejected)
    prompt = _part(prompt, columns.prompt, where)
    _, better = _answer_after(prompt, chosen, columns.chosen, where)
    _, worse = _answer_after(prompt, rejected, columns.rejected, where)
    return prompt, better, worse


def _split_one(value: Any, name: str, where: str) -> tuple[str | Messages, str]:
    """Prompt and answer of one whole dialogue."""
    dialogue = _part(value, name, where)
    if isinstance(dialogue, list):
        if dialogue[-1]["role"] != "assistant" or len(dialogue) < 2:
            raise DataError(f"{where}: {name}: want messages that end in one of role assistant")
        return dialogue[:-1], dialogue[-1]["content"]
    cut = dialogue.rfind(ASSISTANT)
    if cut < 0:
        raise DataError(
            f"{where}: {name}: no prompt column, and no '\\n\\nAssistant:' to find the prompt by"
        )
    cut += len(ASSISTANT)
    return dialogue[:cut], dialogue[cut:]


def _answer_after(
    prompt: str | Messages, answer: str | Messages, name: str, where: str
) -> tuple[str | Messages, str]:
    """The answer's own text, without the prompt it may carry in front."""
    if isinstance(answer, str):
        carries = isinstance(prompt, str) and prompt and answer.startswith(prompt)
        return prompt, answer[len(prompt) :] if carries else answer
    own = answer[len(prompt) :] if isinstance(prompt, list) and answer[:-1] == prompt else answer
    if len(own) != 1 or own[0]["role"] != "assistant":
        raise DataError(
            f"{where}: {name}: want one message of role assistant after the prompt, got roles "
            f"{[message['role'] for message in own]}"
        )
    return prompt, own[0]["content"]


def _common_prefix(chosen: str, rejected: str) -> str:
    n = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected)))
    cut = chosen.rfind(ASSISTANT, 0, n)
    if cut >= 0:
        return chosen[: cut + len(ASSISTANT)]
    # Back to the end of a word: "the answer is ye|s" and "ye|p" share "the answer is".
    whole_word = all(text[n : n + 1].isspace() or n == len(text) for text in (chosen, rejected))
    shared = chosen[:n] if whole_word else re.sub(r"\S+$", "", chosen[:n])
    return shared.rstrip()


def _is_tldr(row: dict[str, Any]) -> bool:
    """openai/summarize_from_feedback, as it was released."""
    return isinstance(row.get("info"), dict) and "summaries" in row


def _tldr_prompt(info: dict[str, Any], where: str) -> str:
    post = info.get("post") or info.get("article")
    if not post:
        raise DataError(f"{where}: info.post: missing")
    head = "".join(
        f"{label}: {prefix}{info[key]}\n\n"
        for label, prefix, key in (("SUBREDDIT", "r/", "subreddit"), ("TITLE", "", "title"))
        if info.get(key)
    )
    return f"{head}POST: {post}\n\nTL;DR:"


def _tldr_pair(row: dict[str, Any], where: str) -> tuple[str, str, str]:
    summaries, choice = row.get("summaries"), row.get("choice")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError(f"{where}: summaries: want two of them")
    if choice not in (0, 1):
        raise DataError(f"{where}: choice: is {choice!r}; want 0 or 1")
    texts = [_pick(each, "text") if isinstance(each, dict) else None for each in summaries]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: summaries: want a text in each")
    # The released texts begin with a space, as what follows "TL;DR:" should.
    texts = [text if text[:1].isspace() else f" {text}" for text in texts]
    return _tldr_prompt(row["info"], where), texts[choice], texts[1 - choice]


# Values of a row, checked.


def _pick(row: dict[str, Any], column: str) -> Any:
    """row["a.b"], or else row["a"]["b"]; None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _missing(row: dict[str, Any], wanted: str, where: str) -> DataError:
    return DataError(f"{where}: no column {wanted}; there are {', '.join(map(str, row)) or 'none'}")


def _number(row: dict[str, Any], column: str, where: str) -> float | None:
    value = _pick(row, column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise DataError(f"{where}: {column}: is {value!r}; want a number")
    return float(value)


def _part(value: Any, name: str, where: str) -> str | Messages:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(value, name, where)
    raise DataError(f"{where}: {name}: is {type(value).__name__}; want text or a list of messages")


def _messages(value: Any, name: str, where: str) -> Messages:
    good = isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in value
    )
    if not good:
        raise DataError(f"{where}: {name}: want messages, each with a role and a content as text")
    if not value:
        raise DataError(f"{where}: {name}: no messages")
    return [{"role": each["role"], "content": each["content"]} for each in value]


# From parts to token ids, all rows in one call of the tokenizer.


def _encode_prompts(
    parts: Sequence[str | Messages], rows: Sequence[tuple[str, Any]], config: Config, tokenizer
) -> list[tuple[str, list[int]]]:
    texts, templated = [], []
    for part, (where, _) in zip(parts, rows):
        if isinstance(part, str) and config.data.parse_dialogues and HUMAN in f"\n\n{part}":
            part = parse_dialogue(part)
        empty = not (part if isinstance(part, list) else part.strip())
        if empty or (isinstance(part, list) and not any(each["content"].strip() for each in part)):
            raise DataError(f"{where}: empty prompt")
        templated.append(isinstance(part, list))
        texts.append(_template(part, where, tokenizer) if isinstance(part, list) else part)
    # A template writes its own special tokens; plain text gets what the tokenizer puts in front.
    encoded: list[list[int]] = [[]] * len(texts)
    for special in (True, False):
        index = [i for i, by_template in enumerate(templated) if by_template != special]
        if index:
            ids = tokenizer([texts[i] for i in index], add_special_tokens=special, verbose=False)
            for i, each in zip(index, ids["input_ids"]):
                encoded[i] = (
                    each[:-1] if each[-1:] == [tokenizer.eos_token_id] and special else each
                )
    for (where, _), ids in zip(rows, encoded):
        if not ids:
            raise DataError(f"{where}: empty prompt: the tokenizer makes no token of it")
    return list(zip(texts, encoded))


def _encode_answers(texts: Sequence[str], config: Config, tokenizer) -> list[list[int]]:
    if config.data.parse_dialogues:
        texts = [text.strip() for text in texts]
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*each, tokenizer.eos_token_id] for each in ids]


def _template(messages: Messages, where: str, tokenizer) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template refuses it: {_line(error)}") from None


def parse_dialogue(text: str) -> Messages:
    """Messages of "\\n\\nHuman: ... \\n\\nAssistant: ..." text, without an unfinished last turn."""
    pieces = re.split(r"\n\n(Human|Assistant):", f"\n\n{text.lstrip()}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(pieces[1::2], pieces[2::2])
    ]
    return turns[:-1] if turns and turns[-1]["content"] == "" else turns


def _fits(ids: list[int], limit: int, what: str, where: str, config: Config) -> bool:
    if limit == 0 or len(ids) <= limit:
        return True
    if config.data.too_long == "error":
        raise DataError(
            f"{where}: {what} of {len(ids)} tokens is over data.max_{what}_tokens={limit} "
            "(data.too_long=drop leaves such rows out)"
        )
    return False


def _some(kept: list, rows: int, key: str, source: str) -> list:
    if not kept:
        raise DataError(f"data.{key}: {source}: no row is left of {rows}")
    if len(kept) < rows:
        log.warning(
            "data.%s: %s: left out %d of %d rows, too long", key, source, rows - len(kept), rows
        )
    return kept


def _toy_world(config: Config, key: str, tokenizer):
    from trainer.toy.world import WORDS, World

    if tokenizer.convert_tokens_to_ids(list(WORDS)) != list(range(len(WORDS))):
        raise DataError(
            f"data.{key}: toy wants the toy world's tokenizer, and model.policy="
            f"{config.model.policy} has another"
        )
    return World(config.toy)


# Rows of a source, each with the place it came from.


def _rows(source: str, key: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.endswith(FILES):
        if not Path(source).is_file():
            raise DataError(f"data.{key}: {source}: no such file")
        rows = _parquet(source) if source.endswith(".parquet") else _jsonl(source)
    else:
        rows = _dataset(source, key)
    some = False
    for each in itertools.islice(rows, limit or None):
        some = True
        yield each
    if not some:
        raise DataError(f"data.{key}: {source}: no rows")


def _jsonl(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:  # bad JSON or bad UTF-8
                    raise DataError(f"{where}: not JSON: {_line(error)}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: is {type(row).__name__}; want an object")
                yield where, row
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {_line(error)}") from None


def _parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not parquet: {_line(error)}") from None


def _dataset(source: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """name, name:split, name#configuration:split; the name may be a folder."""
    match = re.fullmatch(r"(?P<name>[^:#]+)(#(?P<configuration>[^:]+))?(:(?P<split>.+))?", source)
    if match is None:
        raise DataError(f"data.{key}: {source}: want name, name:split or name#configuration:split")
    name, split = match["name"], match["split"] or "train"
    folder = Path(name)
    if not folder.exists() and (
        folder.is_absolute() or name.startswith(".") or name.count("/") > 1
    ):
        raise DataError(f"data.{key}: {source}: no such file or folder")
    import datasets

    try:
        if (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)[split]
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, match["configuration"], split=split)
    except Exception as error:  # the hub, the network, the builder: all raise their own
        raise DataError(f"data.{key}: {source}: cannot be loaded: {_line(error)}") from None
    for number, row in enumerate(rows):
        yield f"{source}: row {number}", row


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
