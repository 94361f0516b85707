"""Rows that are ready to train on, in an Arrow table: in memory, or mapped from the cache.

    rows[3]; len(rows); for row in rows        each is made when it is asked for

160,800 dialogues as Python objects take gigabytes on every rank; mapped, they are the operating
system's and shared by all ranks of a node.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, overload

import pyarrow as pa

from trainer.batch.order import Mixture
from trainer.batch.types import Pair, Prompt

T = TypeVar("T")
Demonstration = tuple[list[int], list[int]]
IDS, TEXT, NUMBER = pa.list_(pa.int32()), pa.string(), pa.float64()


class Kind(NamedTuple):
    """What a row is: its columns, and how it goes in and comes out."""

    name: str
    schema: pa.Schema
    write: Callable[[Any], dict[str, Any]]
    read: Callable[[dict[str, Any]], Any]


def _prompt_in(prompt: Prompt) -> dict[str, Any]:
    # A row's values reach reward functions as JSON has them, cached or not.
    meta = json.dumps(prompt.meta, default=str)
    messages = None if prompt.messages is None else json.dumps(prompt.messages)
    return {
        "ids": prompt.ids,
        "text": prompt.text,
        "domain": prompt.domain,
        "messages": messages,
        "meta": meta,
    }


def _prompt_out(row: dict[str, Any]) -> Prompt:
    messages = row["messages"]
    return Prompt(
        ids=row["ids"],
        text=row["text"],
        domain=row["domain"],
        messages=None if messages is None else json.loads(messages),
        meta=json.loads(row["meta"]),
    )


PROMPTS = Kind(
    "prompts",
    pa.schema([("ids", IDS), ("text", TEXT), ("domain", TEXT), ("messages", TEXT), ("meta", TEXT)]),
    _prompt_in,
    _prompt_out,
)
DEMONSTRATIONS = Kind(
    "demonstrations",
    pa.schema([("prompt", IDS), ("answer", IDS)]),
    lambda both: {"prompt": both[0], "answer": both[1]},
    lambda row: (row["prompt"], row["answer"]),
)
PAIRS = Kind(
    "pairs",
    pa.schema(
        [("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS)]
        + [(name, NUMBER) for name in ("margin", "rating_chosen", "rating_rejected")]
    ),
    vars,
    lambda row: Pair(**row),
)


def table(kind: Kind, rows: Iterable[Any], counts: dict[str, int]) -> pa.Table:
    """`counts`: what was left out, to be said again whenever these rows are loaded."""
    made = pa.Table.from_pylist([kind.write(row) for row in rows], schema=kind.schema)
    return made.replace_schema_metadata({"counts": json.dumps(counts)})


def counts(table: pa.Table) -> dict[str, int]:
    return json.loads((table.schema.metadata or {}).get(b"counts", b"{}"))


class Rows(Sequence[T], Generic[T]):
    """Rows of one kind; `mixture`: where they come from several sources."""

    def __init__(
        self,
        table: pa.Table,
        kind: Kind,
        mixture: Mixture | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.table, self.kind, self.mixture = table, kind, mixture
        self.places = range(table.num_rows) if places is None else places

    @staticmethod
    def of(tables: Sequence[pa.Table], weights: Sequence[float], kind: Kind) -> Rows[Any]:
        """Of several sources, one behind the other."""
        bare = [each.replace_schema_metadata(None) for each in tables]
        mixture = None
        if len(tables) > 1:
            sources = [i for i, each in enumerate(tables) for _ in range(each.num_rows)]
            mixture = Mixture.of(sources, weights)
        return Rows(pa.concat_tables(bare), kind, mixture)

    def take(self, chosen: Sequence[int]) -> Rows[T]:
        """Some of the rows, in this order; they keep their sources' weights."""
        mixture = self.mixture and self.mixture.take(chosen)
        return Rows(self.table, self.kind, mixture, [self.places[i] for i in chosen])

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Rows[T]: ...
    def __getitem__(self, at: int | slice) -> T | Rows[T]:
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        place = self.places[at]
        row = {name: self.table[name][place].as_py() for name in self.table.column_names}
        made: T = self.kind.read(row)
        return made

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def take(rows: Sequence[T], chosen: Sequence[int]) -> Sequence[T]:
    return rows.take(chosen) if isinstance(rows, Rows) else [rows[i] for i in chosen]
