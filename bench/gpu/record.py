"""What a stage has found: one JSON file each, always whole, written as soon as there is something.

status   done, failed (a check is red), crashed, cut (by its limit), missing (what it needs is
         not here), not run (time), running (or its process was killed)
reason   of any other status than done
sources  a hash of the code that is measured: a result of other sources is none of these
found    what the stage says
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.host.machine import ROOT

DONE, FAILED, CRASHED, CUT, MISSING, RUNNING = (
    "done", "failed", "crashed", "cut", "missing", "running",
)  # fmt: skip
# How pytest's process is told where its results go.
FOLDER, STAGE = "GIKERNELS_GPU_FOLDER", "GIKERNELS_GPU_STAGE"
NO_TIME = "not run (time)"
SETTLED = (DONE, FAILED)  # the same sources would say the same again


def sources(root: Path = ROOT) -> str:
    """Of gikernels and what it compiles."""
    package = root / "gikernels"
    csrc = package / "csrc"  # in a checkout a link, which rglob does not follow
    files: Iterable[Path] = [*package.rglob("*.py"), *(csrc.iterdir() if csrc.is_dir() else ())]
    named = sorted((str(path.relative_to(package)), path) for path in files if path.is_file())
    digest = hashlib.sha256()
    for name, path in named:
        if "__pycache__" not in name:
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def short(text: str) -> str:
    """Paths of this checkout without where it lies, which is nobody's business."""
    return text.replace(f"{ROOT}{os.sep}", "")


def write(path: Path, data: Any) -> None:
    """All of it or nothing, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "stage" in data else None


class Red(Exception):
    """A check has failed; what it says is the reason."""


class Missing(Exception):
    """What a stage needs is not here; what it says is what that is."""


class Record:
    """The file of a stage, as the process that carries it out sees it."""

    def __init__(self, folder: Path, stage: str):
        self.path = folder / f"{stage}.json"
        self.data = read(self.path) or {"stage": stage, "status": RUNNING, "found": {}}

    @property
    def found(self) -> dict[str, Any]:
        return self.data["found"]

    def save(self, **found: Any) -> None:
        self.found.update(found)
        write(self.path, self.data)

    def because(self, reason: str) -> None:
        """Why the stage ends as it does, for the exit code that follows."""
        self.data["reason"] = reason
        write(self.path, self.data)
