"""Data: where prompts, demonstrations and pairs come from, and how they become tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from trainer.config.fields import Section, among, filled, key, require

SOURCE = "a path, a name, toy, or reasoning"
COLUMN = "a column's name"
WORLDS = ("toy", "reasoning")
"""Built-in worlds: one stands alone, for it brings its own prompts and judge."""
KEYS = ("demonstrations", "prompts", "pairs", "eval_prompts", "ood_prompts")


@dataclass(frozen=True, kw_only=True)
class Columns(Section, at="data.columns"):
    """Names of the columns in your data; a dot walks into nested fields (info.subreddit)."""

    prompt: str = key("prompt", "The prompt: text, or a list of messages.", filled(COLUMN))
    messages: str = key(
        "messages",
        "A dialogue as a list of {role, content}; used where there is no prompt column.",
        filled(COLUMN),
    )
    response: str = key(
        "",
        "A demonstration's answer; empty: the first of response, completion, label that is there.",
    )
    chosen: str = key(
        "chosen",
        "The better answer: text or messages, with or without the prompt in front.",
        filled(COLUMN),
    )
    rejected: str = key("rejected", "The worse answer, in the same form.", filled(COLUMN))
    domain: str = key(
        "domain", "Optional; for reports and groups.inference=oracle only.", filled(COLUMN)
    )
    margin: str = key(
        "margin", "Optional; by how much chosen is better, for rm.margin.", filled(COLUMN)
    )
    rating: str = key(
        "rating",
        "Optional; absolute ratings of chosen and rejected: <name>_chosen and <name>_rejected.",
        filled(COLUMN),
    )


COLUMNS = tuple(each.name for each in dataclasses.fields(Columns))


@dataclass(frozen=True, kw_only=True)
class Source(Section, at="data.prompts"):
    """One of several sources."""

    source: str = key("", "Like a source that stands alone.", filled(SOURCE), basic=True)
    weight: float = key(
        1.0,
        "Its share of what is trained on, against the other weights; not in evaluations, which "
        "take all rows of each.",
        above=0,
        basic=True,
    )
    domain: str = key(
        "", "The domain of its rows; empty: the row's own, or else the source's name.", basic=True
    )
    columns: Mapping[str, str] = key(
        {}, "Its columns, where they are called otherwise than data.columns says.", among(COLUMNS)
    )

    @property
    def label(self) -> str:
        """What its rows' domain is, where they name none."""
        name = PurePath(self.source.partition("#")[0])
        stem = name.name.split(":")[0]
        for end in (".gz", ".jsonl", ".parquet"):
            stem = stem.removesuffix(end)
        return self.domain or stem


Sources = str | tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Data(Section, at="data"):
    """Sources: toy, reasoning, a .jsonl / .jsonl.gz / .parquet file, or a `datasets` name or
    folder, written name, name:split, name#configuration:split; or a list of {source, weight,
    domain, columns}."""

    demonstrations: Sources = key(
        "toy", "Prompts with answers, for stage sft.", filled(SOURCE), basic=True
    )
    prompts: Sources = key("toy", "Prompts that PPO answers.", filled(SOURCE), basic=True)
    pairs: Sources = key(
        "toy", "Chosen and rejected answers, for stage rm.", filled(SOURCE), basic=True
    )
    eval_prompts: Sources = key("toy", "Prompts of the evaluation; empty: none.", basic=True)
    ood_prompts: Sources = key(
        "toy",
        "Prompts out of the training distribution, for the evaluation; empty: none.",
        basic=True,
    )
    columns: Columns = key(Columns(), "How your columns are called.", basic=True)
    max_prompt_tokens: int = key(512, "Longest prompt.", low=1, basic=True)
    max_answer_tokens: int = key(
        0,
        "Longest answer in demonstrations and pairs, with its EOS; 0: no limit.",
        low=0,
        want="0 (all) or more",
        basic=True,
    )
    too_long: Literal["error", "drop", "truncate_left"] = key(
        "error",
        "What becomes of a longer one: an error that names it; dropped and counted; or a prompt "
        "loses its beginning (an answer that is too long is dropped).",
    )
    as_messages: bool = key(
        False, "A prompt that is plain text becomes a user's message, for the chat template."
    )
    system_prompt: str = key(
        "", "Put before messages that have no system message; empty: none.", basic=True
    )
    template_kwargs: Mapping[str, bool | int | float | str] = key(
        {}, "What the chat template is given besides, such as {enable_thinking: false}."
    )
    cache: str = key(
        "",
        "Folder for rows that have been tokenised once; empty: gi in the user's cache folder; "
        "none: they are tokenised each time.",
        result=False,
    )
    parse_dialogues: bool = key(
        False,
        'Read "\\n\\nHuman: ... \\n\\nAssistant: ..." text as messages, for the chat template.',
    )
    limit: int = key(
        0, "At most this many training rows of each source; 0: all.", low=0, want="0 (all) or more"
    )
    eval_limit: int = key(
        0,
        "At most this many evaluation prompts of each source; 0: all.",
        low=0,
        want="0 (all) or more",
    )

    def relations(self) -> None:
        for name in KEYS:
            entries = getattr(self, name)
            if isinstance(entries, str):
                continue
            at = f"data.{name}"
            require(len(entries) > 0, at, [], "at least one source")
            for i, each in enumerate(entries):
                require(
                    each.source not in WORLDS,
                    f"{at}[{i}].source",
                    each.source,
                    "a file or a data set: a built-in world stands alone",
                )
                require(
                    name not in ("eval_prompts", "ood_prompts") or each.weight == 1,
                    f"{at}[{i}].weight",
                    each.weight,
                    "1: an evaluation takes all rows of each source",
                )
            labels = [each.label for each in entries]
            require(
                all(each.domain or labels.count(each.label) == 1 for each in entries),
                at,
                labels,
                "a domain for each, where names are the same",
            )

    def sources(self, name: str) -> tuple[Source, ...]:
        """One or several, whichever way they are written."""
        entries = getattr(self, name)
        if isinstance(entries, str):
            return (Source(source=entries),) if entries else ()
        return entries

    def columns_of(self, source: Source) -> Columns:
        return dataclasses.replace(self.columns, **source.columns)
