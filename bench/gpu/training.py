"""Steps of a random 0.5B model with our trainer, and with TRL's where that is installed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench.gpu.record import Missing, Record
from bench.training import half_billion

STEPS = 4
WRITING = 5.0  # seconds to say what a run that is cut had found


def run(record: Record, device: str, limit: float) -> None:
    """Writes ours before it begins with the other. A trainer whose packages are not installed is
    named with the package."""
    began = time.monotonic()
    size = half_billion.LARGE if device == "cuda" else half_billion.TINY
    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "model")
        try:
            half_billion.make(str(model), size.dtype, size.shape)
        except ImportError as error:
            raise Missing(f"the trainer needs {error.name}: {error}") from error
        count = half_billion.parameters(model, size)
        record.save(parameters=count, size=size._asdict())
        if "ours" not in record.found:
            left = limit - (time.monotonic() - began) - WRITING
            try:
                figures = half_billion.ours(model, Path(name, "run"), size, STEPS, left)
            except RuntimeError as error:
                if str(error).startswith(("ModuleNotFoundError", "ImportError")):
                    raise Missing(f"the trainer does not start: {error}") from error
                raise
            ceiling = _ceiling(record)
            if ceiling:
                figures["mfu"] = half_billion.mfu(figures, count, ceiling)
            record.save(ours=figures)
        try:
            record.save(trl=half_billion.trl(model, Path(name, "trl"), size, STEPS))
        except ImportError as error:
            record.save(trl_absent=f"{type(error).__name__}: {error}")


def _ceiling(record: Record) -> float | None:
    """The product of the stage `versions`, if that has run."""
    return Record(record.path.parent, "versions").found.get("product_tflops")
