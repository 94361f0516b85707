"""Configurations by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config.document import read
from trainer.config.fields import ConfigError, did_you_mean
from trainer.config.schema import Config, resolve

PACKAGED = Path(__file__).parent


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """A packaged configuration by name, or a file by path, with overrides."""
    path = find(name_or_path)
    data, lines = read(path)
    return resolve(data, lines, overrides, str(Path("runs", path.stem)))


def packaged() -> list[str]:
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError("no such file", where=name_or_path)
    inside = PACKAGED / f"{name_or_path}.yaml"
    if inside.is_file():
        return inside
    meant = did_you_mean(name_or_path, packaged())
    raise ConfigError(
        f"no packaged configuration of this name{meant}; there are {', '.join(packaged())}, "
        "and a path ends in .yaml",
        where=name_or_path,
    )
