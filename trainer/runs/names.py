"""Names and texts that come from data, made safe for where they are shown or stored.

A domain may be called `a/b`, `[math]`, `$\\frac{$`, three hundred letters, or bring an escape
sequence that repaints the terminal. Everything that puts such a name into a file name, a plot, the
terminal or a page asks here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata

LONGEST = 60


def one_line(text: object, longest: int = LONGEST) -> str:
    """For the terminal and for messages: printable, on one line, cut in the middle of nothing."""
    said = "".join(c if _harmless(c) else _escaped(c) for c in " ".join(str(text).split()))
    return said if len(said) <= longest else said[: longest - 1] + "…"


def printable(text: str) -> str:
    """For the terminal, as it is but for what would steer it."""
    return "".join(c if _harmless(c) or c == "\n" else _escaped(c) for c in text)


def file_name(text: object) -> str:
    """Small letters, digits, _ and - (for /), at most LONGEST. Other texts get other names, on file
    systems that do not tell A from a as well: what is not that simple carries a digest."""
    text = str(text)
    if re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", text) and len(text) <= LONGEST:
        return text.replace("/", "-")
    plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in text).strip("_").lower()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: LONGEST - 9]}_{digest}".strip("_")


def in_plot(text: object) -> str:
    """For matplotlib, which the report tells to read no $...$ as mathematics."""
    return one_line(text, 40)


def in_markup(text: object) -> str:
    """For rich, which would read [red] as a colour."""
    return one_line(text).replace("\\", "\\\\").replace("[", r"\[")


def in_html(text: object, longest: int = 0) -> str:
    """For a page. Line breaks stay; 0: as long as it is."""
    text = str(text)
    if longest and len(text) > longest:
        text = text[: longest - 1] + "…"
    return html.escape(shown(text))


def shown(text: str) -> str:
    """As it is but for what cannot be seen, on a page that writes it as text. Line breaks stay."""
    if text.isascii() and text.isprintable():  # which is quick, and nearly all
        return text
    return "".join(c if _harmless(c) or c in "\n\t" else _escaped(c) for c in text)


def label(key: str) -> str:
    """The name in the middle of a metric: domain/<name>/score, where the name may hold slashes."""
    return key.partition("/")[2].rpartition("/")[0]


def _harmless(c: str) -> bool:
    """Neither control nor format characters (bidirectional overrides), surrogates, separators."""
    return c == " " or unicodedata.category(c)[0] not in "CZ"


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")
