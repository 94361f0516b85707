"""The profile of a step: a trace that opens, and memory over time."""

import csv
import json

from trainer.ppo import loop
from trainer.runs import profiling


def test_trace_and_memory_of_the_steps_that_are_asked_for(fresh):
    config, run = fresh("trainer.profile=true", "trainer.profile_steps=[2]", "eval.every=0")
    loop.run(config, run)
    (folder,) = (run.path / "profile").iterdir()
    assert folder.name == "ppo_step_2"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)
    rows = list(csv.reader((folder / "memory.csv").open()))
    assert rows[0] == ["seconds", "device", "bytes"] and len(rows) > 100
    assert {row[1] for row in rows[1:]} <= {"cpu", "cuda"}
    assert max(int(row[2]) for row in rows[1:]) > 10_000
    assert (folder / "memory.png").stat().st_size > 1000


def test_memory_events_are_put_in_order():
    events = [
        {"name": "[memory]", "ts": ts, "args": {"Device Type": kind, "Total Allocated": size}}
        for ts, kind, size in [(3e6, 1, 7), (1e6, 0, 5)]
    ]
    assert profiling.memory([*events, {"name": "aten::add"}]) == [(0, "cpu", 5), (2, "cuda", 7)]
