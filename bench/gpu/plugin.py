"""For pytest, as `-p bench.gpu.plugin`: results are written as they come, for a run may be cut; and
where hypothesis is not installed its tests are skipped, and not the files that they stand in."""

from __future__ import annotations

import inspect
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.record import FOLDER, STAGE, Record

KEPT = 20  # failures, with their last lines


class Results:
    """Of the process that collects them: with pytest-xdist the workers report to it."""

    def __init__(self, record: Record):
        self.record, self.written = record, 0.0
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, str]] = []
        self.slowest: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.add(report.nodeid, report.outcome, report.longreprtext)
        if report.when == "call":
            self.slowest[report.nodeid] = round(report.duration, 2)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.add(report.nodeid, "failed", report.longreprtext)

    def pytest_sessionfinish(self) -> None:
        self.write()

    def add(self, test: str, outcome: str, text: str) -> None:
        self.counts[outcome] += 1
        if outcome == "failed" and len(self.failures) < KEPT:
            self.failures.append({"test": test, "says": text[-1500:]})
        if outcome == "failed" or time.monotonic() - self.written > 1:
            self.write()

    def write(self) -> None:
        slow = sorted(self.slowest.items(), key=lambda item: -item[1])[:10]
        self.record.save(counts=self.counts, failures=self.failures, slowest=dict(slow))
        self.written = time.monotonic()


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER in os.environ and not hasattr(config, "workerinput"):
        record = Record(Path(os.environ[FOLDER]), os.environ[STAGE])
        config.pluginmanager.register(Results(record), "gikernels-results")


# --- in place of hypothesis ---------------------------------------------------------------------


class Anything:
    """A strategy, or what is done with one: nothing is ever drawn."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __or__(self, _: Any) -> Any:
        return self


def given(*strategies: Any, **named: Any) -> Any:
    """The test as a skipped one, with the arguments that pytest still has to find."""

    def skipped(test: Any) -> Any:
        names = [name for name in inspect.signature(test).parameters if name not in named]
        names = names[: len(names) - len(strategies)]

        @pytest.mark.skip(reason="hypothesis is not installed")
        def stand_in(**_: Any) -> None:
            raise AssertionError

        kind = inspect.Parameter.KEYWORD_ONLY
        stand_in.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in names]
        )
        stand_in.__name__, stand_in.__module__ = test.__name__, test.__module__
        stand_in.pytestmark += getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        return stand_in

    return skipped


def same(*_: Any, **__: Any) -> Any:
    return lambda test: test


def without_hypothesis() -> types.ModuleType:
    module = types.ModuleType("hypothesis")
    strategies = types.ModuleType("hypothesis.strategies")
    strategies.__getattr__ = lambda name: Anything()  # type: ignore[method-assign]
    module.__getattr__ = lambda name: Anything()  # type: ignore[method-assign]
    module.given, module.settings, module.example = given, same, same  # type: ignore
    module.strategies = strategies  # type: ignore[attr-defined]
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
    return module


try:
    import hypothesis  # noqa: F401
except ImportError:
    without_hypothesis()
