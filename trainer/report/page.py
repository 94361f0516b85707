"""report.html: one page with its data inside, and plots/*.png of the same charts.

`gi watch` serves the same page; there it asks for new data. Its policy lets nothing run but its own
script and nothing be fetched but that data.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trainer.report.colours import ON_BLACK, ON_WHITE, variables
from trainer.report.document import Document, document, sections
from trainer.report.draw import pictures
from trainer.report.runs import read_runs
from trainer.runs.names import in_html

SCRIPTS = ("page_charts.js", "page_samples.js", "page.js")
"""In this order, as one."""


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """One folder: its report.html and plots/. Several: a comparison, in <first>/comparison/ or
    in `output`. Runs under <folder>/baselines/ are shown beside their own."""
    folders = [Path(folder) for folder in folders]
    runs = read_runs(folders)
    parts = sections(runs)
    target = output or (folders[0] if len(folders) == 1 else folders[0] / "comparison")
    (target / "plots").mkdir(parents=True, exist_ok=True)
    pictures([chart for _, _, charts in parts for chart in charts], target / "plots")
    path = target / "report.html"
    aside = path.with_suffix(".tmp")
    aside.write_text(html(document(runs, title(folders), parts)), encoding="utf-8")
    aside.replace(path)
    return path


def title(folders: Sequence[Path]) -> str:
    what = "Run report" if len(folders) == 1 else "Comparison of runs"
    return f"{what}: {', '.join(folder.resolve().name for folder in folders)}"


def html(said: Document) -> str:
    style = f":root {{ {variables(ON_WHITE)} }}\n" + _text("page.css")
    style = style.replace("/* the palette on black */", variables(ON_BLACK))
    script = "".join(map(_text, SCRIPTS))
    return _text("page.html").format(
        policy=policy(style, script),
        title=in_html(said["title"]),
        style=style,
        data=in_script(said),
        script=script,
    )


def policy(style: str, script: str) -> str:
    """Of what the page may load and run: itself, and data from where it came from."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def in_script(said: Document) -> str:
    """JSON that ends no script element, whatever its texts say."""
    text = json.dumps(said, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _text(file: str) -> str:
    return resources.files("trainer.report").joinpath(file).read_text(encoding="utf-8")
