"""Rows of a source that were tokenised once, in a file that all ranks map into memory.

A file's name is the hash of all that its rows depend on: the source (a file's size and time of
change, a data set's fingerprint), the tokenizer, the settings. Rank 0 writes it aside and renames
it, so that what is there is whole; the others wait. Nothing is ever written over or taken away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from trainer import parallel
from trainer.config import Config
from trainer.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of what rows look like in the files: another one finds none of the old."""


def folder(config: Config) -> Path | None:
    """None: nothing is kept."""
    if config.data.cache == "none":
        return None
    if config.data.cache:
        return Path(config.data.cache)
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above) / "gi"


def key(*parts: Any) -> str:
    text = json.dumps([VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    said = [type(tokenizer).__name__, core, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def cached(where: Path | None, name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The rows of this name: mapped from their file where it is there, else made, on one rank.

    Every rank has to ask, in the same order.
    """
    if where is None:
        return make()
    path = where / f"{name}.arrow"
    error: DataError | None = None
    if parallel.is_main() and not path.is_file():
        try:
            _write(path, make())
        except DataError as wrong:
            error = wrong
    said = [each for each in parallel.gather_objects(str(error) if error else "") if each]
    if error or said:
        raise error or DataError(said[0])
    if not path.is_file():  # a folder that only rank 0's node sees
        _write(path, make())
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write(path: Path, table: pa.Table) -> None:
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise DataError(
            f"data.cache: {path.parent}: {error.strerror or error}; data.cache=none does without"
        ) from None
