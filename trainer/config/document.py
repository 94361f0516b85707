"""YAML 1.2 with the place of every key, and overrides on top of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from trainer.config.fields import ConfigError


# Reading. YAML 1.1, which PyYAML speaks, takes `1e-4` for text and `on` for true. These are the
# rules of YAML 1.2's core schema instead.
class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false|True|False", list("tfTF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's plain data, and file:line of every key in it."""
    lines: dict[str, str] = {}
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"not YAML: {error.problem}", where=f"{path}{line}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split()), where=str(path)) from None

    def build(node: yaml.Node, key: str) -> Any:
        lines.setdefault(key, f"{path}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            out = {}
            for name_node, value_node in node.value:
                name = name_node.value
                inner = f"{key}.{name}" if key else str(name)
                if name in out:
                    where = f"{path}:{name_node.start_mark.line + 1}"
                    raise ConfigError(f"given twice, first at {lines[inner]}", inner, where)
                lines[inner] = f"{path}:{name_node.start_mark.line + 1}"
                out[name] = build(value_node, inner)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(each, f"{key}[{i}]") for i, each in enumerate(node.value)]
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split()), key, lines[key]) from None

    data = build(node, "") if node is not None else {}
    if not isinstance(data, dict):
        raise ConfigError("want sections with keys (section: {key: value})", where=str(path))
    return data, lines


def where_said(key: str, lines: dict[str, str]) -> str:
    """Where `key`, or failing that what holds it, was said."""
    while key and key not in lines:
        key = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", key)
    return lines.get(key, "") if key else ""


def apply(data: dict[str, Any], override: str, lines: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("want section.key=value", where=f"override {override!r}")
    key = key.strip()
    where = f"override {override!r}"
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"not YAML: {problem}", key, where) from None
    *above, last = key.split(".")
    place: Any = data
    for depth, name in enumerate(above):
        if name not in place:
            lines[".".join(above[: depth + 1])] = where
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError("holds one value and no keys", ".".join(above[: depth + 1]), where)
    place[last] = value
    lines[key] = where


def dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=100, allow_unicode=True)


def as_yaml(value: Any) -> str:
    """A plain value in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
