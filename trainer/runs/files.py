"""What is on the disk is whole, or can be told from what is.

A file is written aside, flushed to the disk and renamed. A folder that has to stay as it is has a
manifest.json, written last, with size and checksum of every file in it: models, checkpoints. A text
of many lines ends in a line with its own checksum: pairs. Folders are replaced and removed by
renaming, so a kill leaves the old or the new one, or both, and `settle` puts that in order.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer import parallel
from trainer.runs.faults import RunError

MANIFEST = "manifest.json"


class Damaged(RunError):
    """One line: which file is not what was written, and what to do."""


def write(path: Path, text: str) -> None:
    """The old content or the new, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, said: Any) -> None:
    write(path, json.dumps(said, indent=1) + "\n")


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32, and the file is on the disk afterwards."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
        os.fsync(file.fileno())
    return size, crc


# --- folders with a manifest ----------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """Every file below, by its path from there, but for the manifest itself."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


Entries = dict[str, dict[str, int]]
"""File's name -> bytes, crc32."""


def entries(folder: Path, names: Iterable[str]) -> Entries:
    """What a manifest says of these files."""
    return {name: dict(zip(("bytes", "crc32"), checksum(folder / name))) for name in names}


def seal(folder: Path, files: Entries | None = None, **about: Any) -> None:
    """Write the folder's manifest, and all of it onto the disk."""
    files = entries(folder, names_in(folder)) if files is None else files
    said = {**about, "files": files}
    write(folder / MANIFEST, json.dumps({**said, "crc32": _of_itself(said)}, indent=1) + "\n")
    for inner in {(folder / name).parent for name in files}:
        sync_folder(inner)


def manifest(folder: Path) -> dict[str, Any]:
    """{} where it is missing, or is not a manifest of any file."""
    said = _manifest(folder)
    if said.pop("crc32", None) != _of_itself(said):
        return {}
    return said if _is_manifest(said) else {}


def is_older(folder: Path) -> bool:
    """A manifest as versions wrote it whose states were pickles."""
    said = _manifest(folder)
    return "crc32" not in said and _is_manifest(said)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _of_itself(said: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def _is_manifest(said: dict[str, Any]) -> bool:
    files = said.get("files")
    if not isinstance(files, dict) or not files:
        return False
    return all(map(_is_entry, files.values())) and all(map(_is_inside, files))


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(
        type(entry.get(key)) is int for key in ("bytes", "crc32")
    )


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def problem(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Why this folder is not what was saved; of `ranks`, each reads its share of the files."""
    said = manifest(folder)
    if not said:
        return f"{MANIFEST} is missing or broken"
    more = [name for name in names_in(folder) if name not in said["files"]]
    if more:
        return f"{more[0]} does not belong to it"
    for name, want in sorted(said["files"].items())[rank::ranks]:
        try:
            size = (folder / name).stat().st_size
            if size != want["bytes"]:
                return f"{name} has {size} bytes, want {want['bytes']}"
            if checksum(folder / name)[1] != want["crc32"]:
                return f"{name} has another checksum"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


_seen: dict[Path, object] = {}
"""Folders that were read and found whole, with what tells whether they were written since."""


def refuse_damage(folder: Path, advice: str) -> None:
    """Every rank asks; each reads its share, and once while nothing has changed."""
    now = [(name, (folder / name).stat().st_mtime_ns) for name in names_in(folder)]
    found = None
    if _seen.get(folder.absolute()) != now:
        found = problem(folder, parallel.rank(), parallel.world_size())
    found = next((each for each in parallel.gather_objects(found) if each), None)
    if found:
        raise Damaged(f"{folder} is damaged ({found}): {advice}")
    _seen[folder.absolute()] = now


def copy(source: Path, path: Path) -> None:
    """A sealed folder in the place of `path`."""
    if found := problem(source):
        raise Damaged(f"{source} is damaged ({found}): put back a copy of it")
    aside = aside_of(path)
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, aside)
    if found := problem(aside):  # which also has it on the disk
        raise Damaged(f"{aside}: was not copied whole ({found})")
    replace(aside, path)


# --- replacing and removing folders ---------------------------------------------------------------


def replace(aside: Path, path: Path) -> None:
    """`aside`, which is sealed, in the place of `path`; see `settle`."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    aside.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where its successor is made; empty of what a killed run has left there."""
    aside = path.with_name(f".{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def remove(path: Path) -> None:
    """Renamed first: a folder that is half removed must not look like a whole one."""
    if path.is_dir():
        away = path.with_name(f".{path.name}.old")
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        sync_folder(path.parent)
        shutil.rmtree(away)


def settle(parent: Path) -> None:
    """After a kill inside `write`, `replace` or `remove` of what is in `parent`."""
    for new in sorted(parent.glob(".*.new")):
        path = parent / new.name[1 : -len(".new")]
        if path.exists() or problem(new):
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.rename(path)
    for old in sorted(parent.glob(".*.old")):
        shutil.rmtree(old, ignore_errors=True)
    for cut in parent.glob(".*.tmp"):
        cut.unlink()


# --- texts that end in their checksum -------------------------------------------------------------


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """JSON lines, and one more with their number and checksum."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    end = {"end": text.count("\n"), "crc32": zlib.crc32(text.encode())}
    write(path, text + json.dumps(end) + "\n")


def read_whole_lines(path: Path) -> list[dict] | None:
    """What `write_lines` has written; None where it is no longer that."""
    try:
        text = path.read_bytes().decode("utf-8")
        cut = text.rstrip("\n").rfind("\n") + 1
        body, end = text[:cut], json.loads(text[cut:])
        want = {"end": body.count("\n"), "crc32": zlib.crc32(body.encode())}
        return [json.loads(line) for line in body.splitlines()] if end == want else None
    except (OSError, ValueError, RecursionError):
        return None
