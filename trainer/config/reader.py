"""Configurations by name or path, each over its base.

base: hh_1gpu            # a packaged one, or a path from this file's folder
ppo:
  lr: 5.0e-7             # the rest of ppo, and all other sections, are the base's
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.convert import fields_of
from trainer.config.document import read
from trainer.config.fields import ConfigError, Section, did_you_mean, shortened
from trainer.config.schema import Config, resolve

PACKAGED = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """A packaged configuration by name, or a file by path, with overrides."""
    path = find(name_or_path)
    data, lines = _whole(path)
    return resolve(data, lines, overrides, str(Path("runs", path.stem)))


def packaged() -> list[str]:
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in SUFFIXES:
        if _is_file(path):
            return path
        raise ConfigError("no such file", where=shortened(name_or_path))
    inside = PACKAGED / f"{name_or_path}.yaml"
    if _is_file(inside):
        return inside
    meant = did_you_mean(name_or_path, packaged())
    raise ConfigError(
        f"no packaged configuration of this name{meant}; there are {', '.join(packaged())}, "
        "and a path ends in .yaml",
        where=shortened(name_or_path),
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system holds
        return False


def _whole(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file and its bases say, and the file:line that said it; `above` inherit from it."""
    data, lines = read(path)
    if "base" not in data:
        return data, lines
    base = _base(data.pop("base"), path, lines["base"])
    chain = (*above, path.resolve())
    if base.resolve() in chain:
        names = " -> ".join(each.name for each in (*chain, base))
        raise ConfigError(f"inherits from itself: {names}", "base", lines["base"])
    theirs, places = _whole(base, chain)
    return _merge(theirs, data, Config), places | lines


def _base(name: Any, path: Path, where: str) -> Path:
    if not isinstance(name, str):
        raise ConfigError(f"is {name!r}; want a packaged configuration or a path", "base", where)
    try:
        return find(str(path.parent / name) if name.endswith(SUFFIXES) else name)
    except ConfigError as error:
        raise ConfigError(f"{error.where}: {error.problem}", "base", where) from None


def _merge(base: dict[str, Any], own: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Sections key by key, baselines name by name; any other value of `own` as a whole."""
    sections = {each.name: each.section for each in fields_of(section)}
    merged = dict(base)
    for name, value in own.items():
        theirs, inner = base.get(name), sections.get(name)
        if not (isinstance(value, dict) and isinstance(theirs, dict)):
            merged[name] = value
        elif inner:
            merged[name] = _merge(theirs, value, inner)
        else:
            merged[name] = theirs | value if section is Config else value
    return merged
