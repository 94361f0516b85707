"""Each sink is asked afterwards what it was told, by its own package, of a run that goes on."""

import json
import os
import struct
import subprocess
import sys

import pytest

from trainer.cli import begin
from trainer.runs import sinks
from trainer.runs.checkpoint import mark_finished
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog

SAMPLE = {"prompt": "a | b\n<b>", "response": "c", "domain": None, "score": 0.25, "gold": None}
HIDDEN = {"prompt": "p", "response": "r", "kl": float("nan")}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "letters")
    run.path.mkdir()
    run.config.write_text("ppo: {lr: 0.5}\n")
    yield run
    sinks.close()


def start(run, name, project="tests"):
    """Two stages of one process; the second is killed after its third step."""
    with MetricsLog(run, ("sft",), 0, [name], project) as log:
        log.write("sft", 1, {"sft/loss": 3.0})
    with MetricsLog(run, ("ppo", "eval"), 0, [name], project) as log:
        for step in (1, 2, 3):
            log.write("ppo", step, {"objective/kl": float(step), "nothing": float("nan")})
        log.write_samples("eval", 2, [SAMPLE, HIDDEN])
    sinks.close()


def go_on(run, name, project="tests"):
    """A second process, from the checkpoint of step 2."""
    with MetricsLog(run, ("ppo", "eval"), 2, [name], project) as log:
        for step in (3, 4):
            log.write("ppo", step, {"objective/kl": 10.0 * step})
    sinks.close()


class Recorder:
    def __init__(self, run, project):
        self.said = [("open", sinks.identity(run), project, sinks.settings(run))]

    def __getattr__(self, name):
        return lambda *arguments: self.said.append((name, *arguments))


@pytest.fixture
def recorders(monkeypatch):
    made = []

    def make(run, project):
        made.append(Recorder(run, project))
        return made[-1]

    monkeypatch.setitem(sinks._SINKS, "recorder", make)
    return made


def test_a_sink_is_told_everything_once_a_process(run, recorders):
    start(run, "recorder")
    go_on(run, "recorder")
    first, second = (each.said for each in recorders)
    own = sinks.identity(run)[0]
    assert first[0][1:] == ((own, "letters", "letters"), "tests", {"ppo": {"lr": 0.5}})
    assert second[0] == first[0]  # not another run
    assert first[1:4] == [
        ("begin", "sft", 0), ("write", "sft", 1, {"sft/loss": 3.0}), ("begin", "ppo", 0),
    ]  # fmt: skip
    assert ("write", "ppo", 3, {"objective/kl": 3.0}) in first  # without what is not finite
    assert ("samples", "eval", 2, [SAMPLE, HIDDEN | {"kl": None}]) in first
    assert first[-1] == ("close",)
    assert second[1:3] == [("begin", "ppo", 2), ("begin", "eval", 2)]


def test_a_run_done_anew_is_another_run(run):
    own, _, _ = sinks.identity(run)
    mark_finished(run.checkpoints("sft"), 5)
    begin.do_again(run, ("ppo",))
    assert sinks.identity(run)[0] == own  # its SFT is still that of before
    begin.do_again(run, ("sft", "ppo"))
    assert sinks.identity(run)[0] != own
    run.sinks.write_text("broken")
    assert sinks.identity(run) == sinks.identity(run)


def test_a_baseline_belongs_to_its_run(run):
    inner = run.baseline("plain")
    inner.path.mkdir(parents=True)
    assert sinks.identity(inner)[1:] == ("letters/plain", "letters")
    assert sinks.identity(inner)[0] != sinks.identity(run)[0]


def test_tensorboard_reads_it_back(run):
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(run, "tensorboard")
    go_on(run, "tensorboard")

    def read(stage):
        events = EventAccumulator(str(run.path / "tensorboard" / stage))
        events.Reload()
        return events

    ppo = read("ppo")
    kl = [(each.step, each.value) for each in ppo.Scalars("ppo/objective/kl")]
    assert kl == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]  # step 3 once
    assert [each.value for each in read("sft").Scalars("sft/sft/loss")] == [3.0]
    texts = ppo.Tensors("config/text_summary")
    assert b"ppo: {lr: 0.5}" in texts[-1].tensor_proto.string_val[0]
    shown = read("eval").Tensors("eval/samples/text_summary")[0]
    table = shown.tensor_proto.string_val[0].decode()
    assert shown.step == 2 and table.splitlines() == [
        "| prompt | response | score |",
        "| --- | --- | --- |",
        "| a &#124; b<br>&lt;b> | c | 0.25 |",
        "| p | r |  |",
    ]


def test_wandb_reads_it_back(run, monkeypatch):
    pytest.importorskip("wandb", reason="no wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(run.path / "data"))
    start(run, "wandb")
    go_on(run, "wandb")
    own, _, _ = sinks.identity(run)
    parts = sorted((run.path / "wandb").glob("offline-run-*"))
    assert parts and all(part.name.endswith(f"-{own}") for part in parts)
    history, runs = [], []
    for record in (each for part in parts for each in records(next(part.glob("*.wandb")))):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
            )
    assert {(each.run_id, each.display_name, each.project) for each in runs} == {
        (own, "letters", "tests")
    }
    config = {x.key: x.value_json for each in runs for x in each.config.update}
    assert json.loads(config["ppo"]) == {"lr": 0.5}
    kl = [(x["ppo/step"], x["ppo/objective/kl"]) for x in history if "ppo/objective/kl" in x]
    assert kl == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0), (4, 40.0)]
    assert [x["sft/sft/loss"] for x in history if "sft/sft/loss" in x] == [3.0]
    tables = list((run.path / "wandb").rglob("*samples*.table.json"))
    said = json.loads(tables[0].read_text())
    assert said["columns"] == ["prompt", "response", "score"] and len(said["data"]) == 2


def records(path):
    """Of a .wandb file: a header of 7 bytes; in blocks of 32 KiB, pieces of records behind 7 bytes
    each (checksum, length, and whether a record is whole, begins, goes on or ends here)."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_trackio_reads_it_back(run, tmp_path):
    pytest.importorskip("trackio", reason="no trackio: pip install trackio")
    code = f"""
import json
from tests.trainer.runs.test_sinks import RunFolder, go_on, sinks, start
import trackio
run = RunFolder({str(run.path)!r})
start(run, "trackio"), go_on(run, "trackio")
found = trackio.Api().runs("tests")
from trackio.sqlite_storage import SQLiteStorage
said = [[[r.name, r.config] for r in found], SQLiteStorage.get_logs("tests", found[0].name)]
open({str(tmp_path / "said")!r}, "w").write(json.dumps(said, default=str))
"""
    environment = {
        **os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs, logs = json.loads((tmp_path / "said").read_text())
    own, _, _ = sinks.identity(run)
    assert [name for name, _ in runs] == [f"letters-{own}"]  # one run, not two
    assert runs[0][1]["ppo"] == {"lr": 0.5}
    kl = [(x["step"], x["ppo/objective/kl"]) for x in logs if "ppo/objective/kl" in x]
    assert kl == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0), (4, 40.0)]
    table = next(x["eval/samples"] for x in logs if "eval/samples" in x)
    assert table["_type"] == "trackio.table"
