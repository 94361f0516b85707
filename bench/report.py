"""The table of GPU figures, from the results that are committed:  python -m bench.report

    python -m bench.report            prints it
    python -m bench.report --write    puts it into docs/results.md, between its two marks

Results are the folders bench/results/gpu-*, which `python -m bench.gpu` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu import table
from bench.host.machine import ROOT

BEGIN = "<!-- GPU figures: made by python -m bench.report --write, not by hand -->"
END = "<!-- end of GPU figures -->"


def inserted(page: str, text: str) -> str:
    """The page with `text` between the marks; ValueError where they are not, once each."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"docs/results.md wants one line {BEGIN!r} and one {END!r}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="into docs/results.md")
    args = parser.parse_args(argv)
    text = table.short(root / "bench" / "results")
    if not args.write:
        print(text)
        return 0
    path = root / "docs" / "results.md"
    try:
        path.write_text(inserted(path.read_text(), text))
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
