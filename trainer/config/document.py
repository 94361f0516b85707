"""YAML 1.2 with the place of every key, and overrides on top of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from trainer.config.fields import ConfigError, shortened


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


MOST_BYTES, MOST_VALUES, DEEPEST = 1 << 20, 20_000, 20
"""Of a document. A few lines of aliases can stand for more values than there is memory."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's plain data, and file:line of every key in it."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"is larger than {MOST_BYTES} bytes", where=str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_one_line(error), where=str(path)) from None
    lines: dict[str, str] = {}
    data = parse(text, "", lambda line: f"{path}:{line}", lines, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError("want sections with keys (section: {key: value})", where=str(path))
    return data, lines


def parse(
    text: str, above: str, place: Callable[[int], str], lines: dict[str, str], whole: str
) -> Any:
    """Plain data of a document whose keys stand below `above`; fills in `lines`, key -> place."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        where = place(error.problem_mark.line + 1) if error.problem_mark else whole
        raise ConfigError(f"not YAML: {error.problem}", above, where) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {_one_line(error)}", above, whole) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", above, whole) from None
    count = 0

    def build(node: yaml.Node, key: str, depth: int) -> Any:
        nonlocal count
        count += 1
        where = place(node.start_mark.line + 1)
        if depth > DEEPEST:
            raise ConfigError(f"is nested more than {DEEPEST} deep", above, where)
        if count > MOST_VALUES:
            raise ConfigError(f"has more than {MOST_VALUES} values, aliases included", above, where)
        lines.setdefault(key, where)
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for name_node, value_node in node.value:
                here = place(name_node.start_mark.line + 1)
                if not isinstance(name_node, yaml.ScalarNode):
                    raise ConfigError("a key is a list or a mapping; want a name", key, here)
                name = name_node.value
                inner = f"{key}.{name}" if key else str(name)
                if name in out:
                    raise ConfigError(f"given twice, first at {lines[inner]}", inner, here)
                lines[inner] = here
                out[name] = build(value_node, inner, depth + 1)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(each, f"{key}[{i}]", depth + 1) for i, each in enumerate(node.value)]
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(_one_line(error), key, lines[key]) from None

    return build(node, above, 0) if node is not None else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def where_said(key: str, lines: dict[str, str]) -> str:
    """Where `key`, or failing that what holds it, was said."""
    while key and key not in lines:
        key = re.sub(r"(\.[^.\[]*|\[\d+\]|^[^.\[]*)$", "", key)
    return lines.get(key, "") if key else ""


def apply(data: dict[str, Any], override: str, lines: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("want section.key=value", where=f"override {shortened(override)!r}")
    key = key.strip()
    where = f"override {shortened(override)!r}"
    if len(text) > MOST_BYTES:
        raise ConfigError(f"is larger than {MOST_BYTES} bytes", shortened(key), where)
    value = parse(text, key, lambda line: where, lines, where)
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
