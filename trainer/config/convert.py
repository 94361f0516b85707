"""Between sections and the plain data of a document: types are checked, unknown keys refused."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from trainer.config.fields import ConfigError, Section, choices, did_you_mean, require

LARGEST = 2**62


def build(section: type[Section], data: Any, key: str, root: type) -> Any:
    """A section from plain data; `root` is where an unknown key is looked for elsewhere."""
    if not isinstance(data, dict):
        raise ConfigError(f"is {data!r}; want keys with values", key)
    section = section.kind_of(data)
    known = {each.name: each for each in dataclasses.fields(section)}
    hints = get_type_hints(section)
    values = {}
    for name, value in data.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in known:
            what = "unknown key" if key else "unknown section"
            raise ConfigError(f"{what}{_suggest(str(name), section, root)}", inner)
        values[name] = _convert(value, hints[name], inner, root)
    try:
        return section(**values)
    except ConfigError as error:
        # A section in a list (a reward function) knows its section and not its place.
        own = error.key.removeprefix(section.at)
        raise ConfigError(error.problem, key + own if "[" in key else error.key) from None


def _convert(value: Any, kind: Any, key: str, root: type) -> Any:
    """`value` as the type `kind`, or an error that names key, value and want."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:  # the arm that the value is of: text or a list, text or a number
        return _convert(value, _arm(value, inner), key, root)
    if isinstance(kind, type) and issubclass(kind, Section):
        return build(kind, value, key, root)
    if origin is Literal:
        require(value in inner, key, value, choices(value, inner))
        return value
    if origin is tuple:
        require(isinstance(value, list), key, value, f"a list of {_name(inner[0])}")
        if inner[-1] is not Ellipsis:
            require(
                len(value) == len(inner), key, value, f"a list of {len(inner)} {_name(inner[0])}s"
            )
        return tuple(_convert(each, inner[0], f"{key}[{i}]", root) for i, each in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, dict), key, value, f"names, each with {_name(inner[1])}")
        return {
            str(name): _convert(each, inner[1], f"{key}.{name}", root)
            for name, each in value.items()
        }
    if kind is str and value is None:
        return ""
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= LARGEST, key, value, "a number that 64 bits hold")
        value = kind(value)
    right = type(value) is kind
    require(right, key, value, _name(kind))
    require(kind is not float or math.isfinite(value), key, value, "a finite number")
    return value


def _arm(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The type among `kinds` that fits a value best; the first where none does."""
    as_list = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if as_list is not None and isinstance(value, list):
        return as_list
    return next((kind for kind in kinds if type(value) is kind), kinds[0])


def _name(kind: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if kind in names:
        return names[kind]
    return "list" if get_origin(kind) is tuple else "mapping"


def _suggest(name: str, section: type, root: type) -> str:
    known = [each.name for each in dataclasses.fields(section)]
    # The key may be right and only its section wrong or missing.
    elsewhere = [
        f"{part}.{each.name}"
        for part, kind in get_type_hints(root).items()
        if dataclasses.is_dataclass(kind)
        for each in dataclasses.fields(kind)
        if each.name == name
    ]
    near = did_you_mean(name, known)
    if near and not (elsewhere and section is root):
        return near
    if elsewhere:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    return f"; there are {', '.join(known)}"


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what YAML knows."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping | types.MappingProxyType):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple | list) else value


class Setting(NamedTuple):
    """What a section's field says of itself."""

    name: str
    kind: Any
    """Its type; of a section within a section, that section."""
    default: Any
    doc: str
    basic: bool
    result: bool
    bounds: str
    """In words; empty without any."""

    @property
    def section(self) -> type[Section] | None:
        inner = isinstance(self.kind, type) and issubclass(self.kind, Section)
        return self.kind if inner else None


def fields_of(section: type[Section]) -> list[Setting]:
    kinds = get_type_hints(section)
    return [
        Setting(
            each.name,
            kinds[each.name],
            plain(each.default if each.default_factory is MISSING else each.default_factory()),
            each.metadata["doc"],
            each.metadata["basic"],
            each.metadata["result"],
            each.metadata["bounds"],
        )
        for each in dataclasses.fields(section)
    ]


def flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{above}{name}."))
        else:
            out[f"{above}{name}"] = value
    return out
