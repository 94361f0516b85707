"""The house: what stands above uses what stands below, between files and between folders.

The import graph is drawn from the source; imports inside functions count, and so do those under
TYPE_CHECKING: an arrow is an arrow. `python -m tests.test_architecture` prints the floors.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gikernels", "trainer", "bench")
LONGEST = 450
"""Lines of a file: longer than this and it is two."""
LONG = {"gikernels/reference.py": "the specification of every operation, on one page"}


def modules(package):
    """Dotted name -> file. A folder is its __init__."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {name_of(file): file for file in files}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file, known):
    """The modules of `known` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: a relative import"
            # `from a.b import c` takes the module a.b.c where there is one, and else a name of a.b
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
            found |= {node.module} if not inner <= known else set()
    return found & known


def arrows(package):
    """(file, file) by name."""
    there = modules(package)
    known = set(there)
    return {(a, b) for a, file in there.items() for b in imported(file, known) if a != b}


def folders(package):
    """Arrows between folders: the first and second part of a name, or the package's own files.

    A package's public face (its __init__ and __main__) stands above all of its folders; whoever
    imports the face from inside a folder would close a circle, and is shown as one.
    """
    there = modules(package)

    def folder(name):
        parts = name.split(".")
        inside = len(parts) > 2 or there[name].name == "__init__.py"
        return ".".join(parts[:2]) if inside and len(parts) > 1 else name

    return {(folder(a), folder(b)) for a, b in arrows(package) if folder(a) != folder(b)}


def floors(edges):
    """Name -> floor; raises with the circle where there is one."""
    below = defaultdict(set)
    for a, b in edges:
        below[a].add(b)
    done, path = {}, []

    def floor(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            done[name] = 1 + max((floor(other) for other in sorted(below[name])), default=-1)
            path.pop()
        return done[name]

    for name in sorted({name for edge in edges for name in edge}):
        floor(name)
    return done


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_files(package):
    floors(arrows(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_folders(package):
    floors(folders(package))


# Bottom to top. A folder may use what stands before it and nothing else; between the two packages
# arrows run from trainer to gikernels, and bench stands above both.
TRAINER = [
    "config",
    "parallel",
    "batch",
    "runs",
    "worlds",
    "data",
    "models",
    "rollout",
    "rewards",
    "report",
    "ppo",
    "stages",
    "cli",
]


def test_the_trainers_floors_are_as_the_documents_say():
    place = {f"trainer.{name}": i for i, name in enumerate(TRAINER)}
    assert {p.name for p in (ROOT / "trainer").iterdir() if (p / "__init__.py").exists()} == set(
        TRAINER
    )
    up = [
        f"{a} -> {b}"
        for a, b in sorted(folders("trainer"))
        if a in place and b in place and place[b] >= place[a]
    ]
    assert not up, up
    drawing = (ROOT / "docs" / "architecture.md").read_text()
    assert all(f"{name}/" in drawing for name in TRAINER)


@pytest.mark.parametrize("package, others", [("gikernels", ("trainer", "bench", "transformers")),
                                             ("trainer", ("bench", "tests"))])  # fmt: skip
def test_packages_do_not_look_up(package, others):
    known = set(modules(package))
    for file in modules(package).values():
        if package == "gikernels" and "integrations" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            up = [name for name in names if name.split(".")[0] in others and name not in known]
            assert not up, f"{file}: {up}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_it_is_for(package):
    for file in (ROOT / package).rglob("__init__.py"):
        line = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        assert len(line) > 20 and line.endswith("."), f"{file}: {line!r}"


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    long = {
        str(file.relative_to(ROOT)): lines
        for file in modules(package).values()
        if (lines := len(file.read_text().splitlines())) > LONGEST
    }
    assert long.keys() <= LONG.keys(), long


def test_a_circle_is_found(tmp_path):
    """The test of the tests."""
    with pytest.raises(AssertionError, match="a -> b -> c -> a"):
        floors({("a", "b"), ("b", "c"), ("c", "a")})
    assert floors({("a", "b"), ("b", "c")}) == {"a": 2, "b": 1, "c": 0}
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def f():\n    from trainer.ppo import loop\n    import trainer.runs.log\n")
    known = {"trainer.ppo", "trainer.ppo.loop", "trainer.runs.log"}
    assert imported(lazy, known) == {"trainer.ppo.loop", "trainer.runs.log"}


if __name__ == "__main__":
    for package in PACKAGES:
        edges = folders(package)
        levels = floors(edges)
        print(f"{package}: {len(modules(package))} files, {len(arrows(package))} arrows between "
              f"them on {max(floors(arrows(package)).values()) + 1} floors; "
              f"{len(edges)} arrows between folders")  # fmt: skip
        for level in sorted(set(levels.values()), reverse=True):
            print(f"  {level}  {'  '.join(n for n in sorted(levels) if levels[n] == level)}")
