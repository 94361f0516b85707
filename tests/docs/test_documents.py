"""Every document of the repository: links and anchors, code blocks, commands, settings."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

import gikernels
from trainer import config as settings
from trainer.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/results/*.md")
    for path in sorted(ROOT.glob(pattern))
]
MADE = {"docs/operations/index.md", "docs/settings.md"}
"""Pages that the site makes from the code."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, *languages):
    for block in FENCE.finditer(path.read_text()):
        if block[2] in languages:
            lines = block[3].splitlines()
            yield "\n".join(line.removeprefix(block[1]) for line in lines) + "\n"


def anchors(path):
    """What a heading is called in a link, as GitHub and the site spell it."""
    text = FENCE.sub("", path.read_text())
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    for found in LINK.finditer(FENCE.sub("", path.read_text())):
        target, _, anchor = (found[1] or found[2]).partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        aim = (path.parent / target).resolve() if target else path
        if aim.is_relative_to(ROOT) and name_of(aim) in MADE:
            continue
        assert aim.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(aim), f"{target or path.name} has no #{anchor}"


# --- operations -----------------------------------------------------------------------------------

OPERATIONS = [name for name in gikernels.__all__ if not isinstance(getattr(gikernels, name), type)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operations_example_runs(name):
    page = ROOT / "docs" / "operations" / f"{name}.md"
    assert page.is_file(), "an operation wants a page: its formula, and an example that runs"
    assert page.read_text().startswith(f"# {name}\n")
    examples = list(blocks(page, "python"))
    assert examples and any(name in each for each in examples)
    for example in examples:
        exec(compile(example, str(page), "exec"), {})


# --- code, commands, settings ---------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_compiles_and_imports_what_there_is(path):
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module, alias.name) for alias in node.names]
            else:
                continue
            for module, name in names:
                if module.split(".")[0] in ("gikernels", "trainer"):
                    assert name is None or name in names_in(module), f"{module} has no {name}"


def names_in(module):
    """Without importing it, or what it is for (TRL, verl)."""
    for node in ast.parse(Path(importlib.util.find_spec(module).origin).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def commands(path):
    """The words of each command line in a document's plain and shell blocks."""
    for block in blocks(path, "", "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "'" not in line.partition("#")[2] else []
            words = words or line.partition("#")[0].split()
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_are_there(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path):
        program, rest = words[0].rpartition("/")[2], words[1:]
        if program == "torchrun":
            rest = rest[rest.index("-m") :]
            program = "python"
        if program in ("python", "python3") and rest[0] == "-m":
            module = rest[1]
            if module.split(".")[0] in ("gikernels", "trainer", "bench", "tests"):
                assert importlib.util.find_spec(module), f"no module {module}"
            if module == "trainer":
                program, rest = "gi", rest[2:]
        if program == "make":
            assert rest[0] in targets or "=" in rest[0], f"no such target: make {rest[0]}"
        if program == "gi":
            check_gi(rest)


def check_gi(words):
    assert words[0] in (*COMMANDS, "COMMAND"), f"no such command: gi {words[0]}"
    overrides = [word for word in words[1:] if re.fullmatch(r"[a-z_]+\.[\w.]+=.*", word)]
    if len(words) > 1 and words[1] in settings.packaged():
        settings.load(words[1], overrides)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_configurations_are_accepted(path, tmp_path):
    sections = {each.name for each in settings.fields_of(settings.Config)} | {"base"}
    for block in blocks(path, "yaml"):
        data = yaml.safe_load(block)
        if isinstance(data, dict) and data.keys() <= sections:
            (tmp_path / "config.yaml").write_text(block)
            settings.load(str(tmp_path / "config.yaml"))
