"""Pages of the site that the code writes; mkdocs itself is not needed for them."""

import gikernels
from docs.site import pages
from tests.docs.test_documents import OPERATIONS, ROOT
from trainer import config


def test_every_operation_is_listed_and_has_its_page():
    listed = [name for names in pages.families().values() for name in names]
    assert sorted(listed) == sorted(OPERATIONS)
    index = pages.operations_index()
    for name in OPERATIONS:
        assert f"[`{name}`]({name}.md)" in index
        written = (ROOT / "docs" / "operations" / f"{name}.md").read_text()
        page = pages.operation(name, written)
        assert page.startswith(f"# {name}\n\n```python\ndef {name}(")
        assert "## Example" in page and page.count("```") % 2 == 0
        assert ("## Specification" in page) == (
            getattr(gikernels.reference, name, getattr(gikernels, name))
            is not getattr(gikernels, name)
        )


def test_a_page_has_shapes_docstring_formula_and_specification():
    page = pages.operation("gae", (ROOT / "docs" / "operations" / "gae.md").read_text())
    places = [
        page.index(text)
        for text in (
            "rewards: Tensor,  # (S, T)",
            "```python\nfor t in reversed(range(T)):\n    delta",
            "## Formula\n\n$$",
            "## Example\n\n```python\nimport torch",
            "## Specification",
        )
    ]
    assert places == sorted(places)


def test_every_setting_has_its_row():
    page = pages.settings()
    for section in config.fields_of(config.Config):
        assert f"\n## {section.name}\n" in page
        for each in config.fields_of(section.section) if section.section else ():
            assert f"`{each.name}`" in page
    assert "| **`prompts_per_step`** | `64` | whole number; 1 or more |" in page
    assert "| **`engine`** | `hf` | `hf`, `vllm` |" in page
