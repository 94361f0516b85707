"""A run folder that somebody else has written runs nothing when a run goes on from it."""

import json
import os
import pickle
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.trainer.runs.test_checkpoint import Small
from trainer.runs.checkpoint import CheckpointError


class Evil:
    """What its pickle does when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def resealed(folder):
    """The manifest as a careful attacker leaves it: right for what is there now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    contents = {f.name: f.read_bytes() for f in folder.iterdir() if f != path}
    manifest.pop("crc32")
    manifest["files"] = {n: {"bytes": len(c), "crc32": zlib.crc32(c)} for n, c in contents.items()}
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps(manifest))


def test_a_checkpoint_of_an_older_version_is_refused_and_not_passed_over(saved, tmp_path):
    said = json.loads((saved / "manifest.json").read_text())
    del said["crc32"]
    (saved / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="older versions kept pickles"):
        Small(tmp_path).open(resume=True)


@pytest.mark.parametrize("key", ["step", "stage", "ranks", "score"])
def test_a_manifest_is_checked_too(saved, tmp_path, capsys, key):
    said = json.loads((saved / "manifest.json").read_text())
    said[key] = 7
    (saved / "manifest.json").write_text(json.dumps(said))
    Small(tmp_path).open(resume=True)
    assert "step_1 is damaged (manifest.json is missing or broken)" in capsys.readouterr().out


@pytest.fixture
def saved(tmp_path):
    small = Small(tmp_path)
    with small.open(resume=False) as checkpoints:
        small.state.step = 1
        checkpoints.save()
    return tmp_path / "checkpoints" / "sft" / "step_1"


def in_the_index(folder, mark):
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Evil(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def in_place_of_the_index(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))


def as_an_entry(folder, mark):
    """As older versions kept their random states and counters."""
    (folder / ".metadata").unlink()
    state = {"step": Evil(mark), "random/rank_0": pickle.dumps(Evil(mark))}
    weights = Small(folder.parent / "other").state.state_dict()
    for name in ("model.m", "optimizer.m"):
        for key, value in weights[name].items():
            inner = value if isinstance(value, dict) else {"": value}
            state |= {f"{name}/{key}/{k}".rstrip("/"): each for k, each in inner.items()}
    dcp.save(state, checkpoint_id=folder)


@pytest.mark.parametrize("attack", [in_the_index, in_place_of_the_index, as_an_entry])
def test_a_crafted_checkpoint_is_refused_in_one_line_and_runs_nothing(saved, tmp_path, attack):
    mark = tmp_path / "executed"
    attack(saved, mark)
    resealed(saved)
    with pytest.raises(CheckpointError, match="step_1: ") as refused:
        Small(tmp_path).open(resume=True)
    assert not mark.exists()
    assert "\n" not in str(refused.value)


def test_an_index_does_not_lead_out_of_its_folder(saved, tmp_path):
    index = pickle.loads((saved / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../step_0/__0_0.distcp"
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    resealed(saved)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        Small(tmp_path).open(resume=True)


def test_a_checkpoint_holds_tensors_alone(saved):
    index = pickle.loads((saved / ".metadata").read_bytes())
    kinds = {type(entry).__name__ for entry in index.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
    for file in saved.glob("*.distcp"):
        assert b"numpy" not in file.read_bytes()


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", "null", '{"files": {}}', '{"files": {"a": 1}}', '{"step": 1, "files": []}',
     '{"files": {"../x": {"bytes": 0, "crc32": 0}}}', "[" * 100_000, "no ranks"],
)  # fmt: skip
def test_a_crafted_manifest_is_a_damaged_checkpoint(saved, tmp_path, capsys, manifest):
    if manifest == "no ranks":
        said = json.loads((saved / "manifest.json").read_text())
        del said["ranks"]
        manifest = json.dumps(said)
    (saved / "manifest.json").write_text(manifest)
    again = Small(tmp_path)
    again.open(resume=True)
    assert again.state.step == 0
    assert "step_1 is damaged (manifest.json is missing or broken)" in capsys.readouterr().out


def test_a_file_that_the_manifest_does_not_know_is_damage(saved, tmp_path, capsys):
    (saved / "__7_0.distcp").write_bytes(b"")
    Small(tmp_path).open(resume=True)
    assert "__7_0.distcp does not belong to it" in capsys.readouterr().out


def test_random_generators_come_back_to_the_number(saved, tmp_path):
    import random

    import numpy as np

    random.gauss(0, 1)  # keeps a second number back
    np.random.standard_normal()
    small = Small(tmp_path)
    checkpoints = small.open(resume=True)
    small.state.step = 2
    checkpoints.random.seed("another")
    random.gauss(0, 1)
    checkpoints.save()

    def draws():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(())

    want = draws()
    draws()
    Small(tmp_path).open(resume=True)
    assert draws() == want
