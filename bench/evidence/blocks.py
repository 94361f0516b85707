"""A page as a list of blocks, and its two ways to be written down: Markdown and one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """kind: heading (level 2), text, table, picture."""

    kind: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def markdown(title: str, blocks: Sequence[Block]) -> str:
    lines = [f"# {title}", ""]
    for block in blocks:
        if block.kind == "heading":
            lines += [f"## {block.text}", ""]
        elif block.kind == "picture":
            lines += [f"![{block.text}]({block.text})", ""]
        elif block.kind == "table":
            lines.append(f"| {' | '.join(block.head)} |")
            lines.append(f"|{'---|' * len(block.head)}")
            rows = (" | ".join(row).replace("\n", "<br>") for row in block.rows)
            lines += [f"| {row} |" for row in rows]
            lines.append("")
        else:
            lines += [block.text, ""]
    return "\n".join(lines)


def html(title: str, blocks: Sequence[Block], target: Path) -> str:
    style = "\n" + Path(__file__).with_name("page.css").read_text()
    parts = []
    for block in blocks:
        if block.kind == "heading":
            parts.append(f"<h2>{escape(block.text)}</h2>")
        elif block.kind == "picture":
            data = base64.b64encode((target / block.text).read_bytes()).decode()
            source = f"data:image/png;base64,{data}"
            parts.append(f'<figure><img alt="{escape(block.text)}" src="{source}"></figure>')
        elif block.kind == "table":
            head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
            body = "".join(_html_row(row) for row in block.rows)
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
        else:
            parts.append(f"<p>{escape(block.text)}</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _html_row(row: Sequence[str]) -> str:
    first, *rest = (escape(cell).replace("\n", "<br>") for cell in row)
    return f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
