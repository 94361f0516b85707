"""Rows of a source, each with the place it came from."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.data.errors import DataError, first_line

FILES = (".jsonl", ".jsonl.gz", ".parquet")


def read_rows(source: str, key: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
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


def state(source: str, key: str) -> list[Any]:
    """What changes when the rows of a source do."""
    if source.endswith(FILES):
        if not Path(source).is_file():
            raise DataError(f"data.{key}: {source}: no such file")
        stat = Path(source).stat()
        return [str(Path(source).resolve()), stat.st_size, stat.st_mtime_ns]
    return [getattr(_load(source, key), "_fingerprint", "")]


def _jsonl(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
                    raise DataError(f"{where}: not JSON: {first_line(error)}") from None
                if _has_surrogates(line, row):
                    raise DataError(f"{where}: not text: half of a character, a lone surrogate")
                if not isinstance(row, dict):
                    raise DataError(f"{where}: is {type(row).__name__}; want an object")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {first_line(error)}") from None


def _has_surrogates(line: bytes, row: object) -> bool:
    """JSON may spell half of a character, and no tokenizer reads it."""
    if b"\\u" not in line:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not parquet: {first_line(error)}") from None


def _dataset(source: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(_load(source, key)):
        yield f"{source}: row {number}", row


@lru_cache(maxsize=1)
def _load(source: str, key: str) -> Any:
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
            return datasets.load_from_disk(name)[split]
        elif (folder / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, match["configuration"], split=split)
    except Exception as error:  # the hub, the network, the builder: all raise their own
        raise DataError(f"data.{key}: {source}: cannot be loaded: {first_line(error)}") from None
