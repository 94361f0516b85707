"""bench/ in rooms: arrows between files and between folders point one way, and no file is long."""

import ast
from pathlib import Path

import pytest

from bench.host.machine import ROOT

FILES = sorted((ROOT / "bench").rglob("*.py"))
ROOMS = ("evidence", "gpu", "host", "ops", "training")
LINES = 450


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in FILES}


def room_of(name: str) -> str:
    """A folder of bench/, or the file that lies in bench/ itself."""
    return ".".join(name.split(".")[:2])


def arrows() -> dict[str, set[str]]:
    """What each file imports of bench, wherever in the file."""
    out = {}
    for name, path in NAMES.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {each.name for each in node.names if each.name in NAMES}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench"):
                for each in node.names:
                    whole = f"{node.module}.{each.name}"
                    found.add(whole if whole in NAMES else node.module)
        out[name] = found - {name}
    return out


def circle(arrows: dict[str, set[str]]) -> list[str]:
    seen: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in seen:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        seen.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def test_no_circle_between_files_or_rooms():
    files = arrows()
    assert any(files.values()) and circle(files) == []
    rooms: dict[str, set[str]] = {}
    for name, others in files.items():
        here = {room_of(other) for other in others} - {room_of(name), "bench"}
        rooms.setdefault(room_of(name), set()).update(here)
    assert circle(rooms) == []
    assert rooms["bench.host"] == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room):
    text = ast.get_docstring(ast.parse((ROOT / "bench" / room / "__init__.py").read_text()))
    assert text and len(text.splitlines()[0]) > 20


def test_every_folder_is_a_room():
    there = {p.parent.relative_to(ROOT / "bench").parts[:1] for p in FILES} - {()}
    assert there == {(room,) for room in ROOMS}
