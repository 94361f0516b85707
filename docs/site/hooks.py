"""What mkdocs does not do by itself: pages from the code, links out of docs/, formulas.

Operations: docs/operations/<name>.md has formula and example; signature and docstring come before
them and the specification after, from the code. A new operation thus appears by itself. Settings:
from the configuration's schema. Links to files outside docs/ lead to pages made of those files.
"""

from __future__ import annotations

import importlib
import os
import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs.site import pages  # noqa: E402

OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
IMAGES = (".png", ".svg")
LINK = re.compile(r"(\]\(|src=\")(?!\w+:)([^)#\"\s]+)(#[^)\"\s]*)?([)\"])")
NAMED = re.compile(r"(<mi>(?:log|tanh|exp|max|sg)</mi>)(?!<mo)")
ELSEWHERE = re.compile(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\" >]*")
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.MULTILINE | re.DOTALL)


def on_config(config):
    """The navigation gets the operations, family by family, and what nobody has listed."""
    importlib.reload(pages)
    families = [
        {family: [f"operations/{name}.md" for name in names]}
        for family, names in pages.families().items()
    ]
    section = next(entry["Operations"] for entry in config.nav if "Operations" in entry)
    section[1:1] = families
    listed = str(config.nav)
    docs = ROOT / "docs"
    unlisted = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    house = next(entry["The house"] for entry in config.nav if "The house" in entry)
    house += [uri for uri in unlisted if f"'{uri}'" not in listed]
    return config


def on_files(files, config):
    made = {"operations/index.md": pages.operations_index(), "settings.md": pages.settings()}
    for names in pages.families().values():
        for name in names:
            if not (ROOT / "docs" / "operations" / f"{name}.md").is_file():
                made[f"operations/{name}.md"] = f"# {name}\n"
    for source, target in OUTSIDE.items():
        made[target] = _moved((ROOT / source).read_text(), "", target)
    seen = {ROOT / source for source in OUTSIDE}
    todo = [(file.src_uri, Path(file.abs_src_path)) for file in files.documentation_pages()]
    todo += [(target, ROOT / source) for source, target in OUTSIDE.items()]
    while todo:  # what a page outside leads to lies outside, too
        _, path = todo.pop()
        for found in LINK.finditer(path.read_text()):
            aim = (path.parent / found[2]).resolve()
            outside = aim.is_relative_to(ROOT) and not _inside(aim) and aim.exists()
            if aim in seen or not outside:
                continue
            seen.add(aim)
            uri = _uri(aim)
            if aim.suffix in IMAGES:
                files.append(File.generated(config, uri, abs_src_path=str(aim)))
                continue
            made[uri] = _page_of(aim)
            if aim.suffix == ".md":
                todo.append((uri, aim))
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    folder, name = posixpath.split(uri)
    if folder == "operations" and name != "index.md":
        markdown = pages.operation(name.removesuffix(".md"), markdown)
    if not page.file.generated_by:
        markdown = _moved(markdown, posixpath.join("docs", folder), uri)
    return FORMULA.sub(lambda found: _formula(found[1]), markdown)


def on_post_build(config):
    """Who reads a page is known to nobody else: nothing in it is loaded from elsewhere."""
    for path in Path(config.site_dir).rglob("*.html"):
        if found := ELSEWHERE.search(path.read_text()):
            raise PluginError(f"{path} loads {found[0]}")


def _formula(latex: str) -> str:
    math = NAMED.sub(r'\1<mspace width="0.17em"/>', convert(latex, display="block"))
    return f'<div class="formula">{math}</div>\n'


def _inside(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")


def _uri(path: Path) -> str:
    """Where the site has a file or folder from outside docs/."""
    relative = path.relative_to(ROOT).as_posix()
    if relative in OUTSIDE:
        return OUTSIDE[relative]
    if path.suffix in (*IMAGES, ".md"):
        return f"repository/{relative}"
    return f"repository/{relative}.md"


def _page_of(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    if path.suffix == ".md":
        return _moved(path.read_text(), posixpath.dirname(relative), _uri(path))
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.name[0] not in "._")
        return f"# {relative}/\n\n" + "".join(f"- `{name}`\n" for name in names)
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    fence = "`````"
    return f"# {relative}\n\n{fence}{language}\n{path.read_text()}{fence}\n"


def _moved(markdown: str, folder: str, uri: str) -> str:
    """Links that a document in `folder` of the repository has, as its page `uri` wants them."""

    def link(found: re.Match[str]) -> str:
        aim = Path(os.path.normpath(ROOT / folder / found[2]))
        if not (aim.is_relative_to(ROOT) and (aim.exists() or _inside(aim))):
            return found[0]  # `](` in a piece of code, say
        target = aim.relative_to(ROOT / "docs").as_posix() if _inside(aim) else _uri(aim)
        relative = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{found[1]}{relative}{found[3] or ''}{found[4]}"

    return LINK.sub(link, markdown)
