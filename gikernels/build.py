"""Compiles csrc/ on first use."""

from __future__ import annotations


def status(name: str) -> tuple[bool, str]:
    """Whether the compiled backend `name` ("cpp" or "cuda") can run here, and why not."""
    return False, "csrc/ is not built"
