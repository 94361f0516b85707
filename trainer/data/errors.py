"""What is wrong with data: one line."""

from __future__ import annotations


class DataError(ValueError):
    """One line that names the file and line (or the setting), the column, and what is wrong."""

    for_user = True


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
