"""Pages that the code writes: one for each operation, and one of every setting."""

from __future__ import annotations

import inspect
import re
import textwrap
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import gikernels
from gikernels import reference
from trainer import config

FAMILIES = {
    "gikernels.vocabulary": "Over the vocabulary",
    "gikernels.sequence": "Over the steps of a sequence",
    "gikernels.groups": "Over groups",
    "gikernels.meta": "Reward models",
    "gikernels.backends": "What runs where",
}


# --- operations -----------------------------------------------------------------------------------


def families() -> dict[str, list[str]]:
    """Name of a family -> its operations: whatever `gikernels` exports that can be called."""
    found: dict[str, list[str]] = {title: [] for title in FAMILIES.values()}
    for name in gikernels.__all__:
        each = getattr(gikernels, name)
        if not isinstance(each, type):
            module = inspect.unwrap(each).__module__
            title = next((t for prefix, t in FAMILIES.items() if module.startswith(prefix)), None)
            found.setdefault(title or "More", []).append(name)
    return {title: names for title, names in found.items() if names}


def first_line(name: str) -> str:
    text = inspect.getdoc(getattr(gikernels, name)) or ""
    return " ".join(re.split(r"\n\s*\n|:\n", text)[0].split()).rstrip(":.")


def operations_index() -> str:
    lines = ["# Operations", ""]
    lines += [
        "`import gikernels` takes torch, and Triton where a kernel runs; it probes and prints "
        "nothing. Statistics are fp32 whatever the inputs; masks are bool, and what lies at masked "
        "places, NaN included, never reaches a result or a gradient; denominators are global. A "
        "bad argument raises a ValueError that names it. Each page has the signature, the formula, "
        "an example that the tests run, and the specification: the operation in plain PyTorch.",
        "",
        "S sequences, T padded steps, N rows (flat tokens), D hidden, V vocabulary, G groups.",
    ]
    for title, names in families().items():
        lines += ["", f"## {title}", "", "| operation | what it gives |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | {_cell(first_line(name))} |" for name in names]
    lines += ["", "## What they return", ""]
    for name in gikernels.__all__:
        each = getattr(gikernels, name)
        if hasattr(each, "_fields"):
            lines += [f"### {name}", "", _code(inspect.getsource(each))]
    return "\n".join(lines) + "\n"


def operation(name: str, written: str) -> str:
    """The page of an operation, around what was written of it: formula and example."""
    if not hasattr(gikernels, name):
        return written
    function = getattr(gikernels, name)
    heading, _, rest = written.partition("\n")
    doc = inspect.getdoc(function) or ""
    parts = [heading, _code(signature(function)), _docstring(doc)]
    formula, example, code = rest.partition("```python")
    if formula.strip():
        parts += ["## Formula", formula.strip()]
    if example:
        parts += ["## Example", example + code.rstrip()]
    if spec := getattr(reference, name, None):
        said = "The same in plain PyTorch, from `gikernels/reference.py`: what tests compare with."
        if spec is not function:
            parts += ["## Specification", said, _code(inspect.getsource(spec))]
        else:
            parts += ["## Source", _code(inspect.getsource(spec))]
    return "\n\n".join(parts) + "\n"


def signature(function: Any) -> str:
    """As it stands in the source, with the shapes in its comments."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    source = source[source.index("def ") :]
    end = re.search(r"^\)( -> .*)?:$|^def .*:$", source, re.MULTILINE)
    return source[: end.end()].rstrip(":") if end else source.partition(":\n")[0]


def _docstring(text: str) -> str:
    """Markdown already, but for the indent of its code, which a list would take for its own."""
    return re.sub(
        r"(?:^(?: {4,}.*)?\n?)+",
        lambda found: _as_block(found[0]) if found[0].strip() else found[0],
        text,
        flags=re.MULTILINE,
    )


def _as_block(code: str) -> str:
    return f"\n{_code(textwrap.dedent(code).strip())}\n\n"


def _code(source: str) -> str:
    return f"```python\n{source.strip()}\n```"


# --- settings -------------------------------------------------------------------------------------


def settings() -> str:
    lines = [
        "# Every setting",
        "",
        "As `gi keys` prints them. Set one in a configuration's section, or on the command line as "
        "`section.key=value`; an unknown key, a wrong type or a value out of bounds is one line "
        "that names it. **Bold**: most people who train something look at it.",
    ]
    for section in config.fields_of(config.Config):
        lines += ["", f"## {section.name}", "", section.doc]
        if section.section is None:
            lines += ["", f"`{section.name}: {config.as_yaml(section.default)}`"]
        else:
            lines += ["", *_table(section.section)]
    lines += ["", "## Rewards by name", "", "Entries of `reward.functions`, with their options."]
    common = {each.name for each in config.fields_of(config.RewardFunction)}
    for name, kind in config.NAMED.items():
        doc = " ".join((kind.__doc__ or "").split())
        lines += ["", f"### {name}", "", doc, "", *_table(kind, common)]
    return "\n".join(lines) + "\n"


def _table(section: type, without: set[str] = frozenset()) -> list[str]:
    rows = ["| key | default | values | |", "|---|---|---|---|"]
    for each in config.fields_of(section):
        if each.name not in without:
            name = f"**`{each.name}`**" if each.basic else f"`{each.name}`"
            default = config.as_yaml(each.default).strip()
            default = f"`{default}`" if default else ""
            values = "; ".join(filter(None, (_kind(each.kind), each.bounds)))
            rows.append(f"| {name} | {default} | {_cell(values)} | {_cell(each.doc)} |")
    return rows


def _kind(kind: Any) -> str:
    """A type as a user would say it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin is UnionType:
        return " or ".join(map(_kind, inner))
    if origin is tuple:
        return f"a list of {_kind(inner[0])}s"
    if origin is not None:
        return "a mapping"
    known = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return known.get(kind, kind.__name__.lower())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
