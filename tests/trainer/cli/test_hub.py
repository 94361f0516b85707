"""What is fetched before ranks wait for each other."""

import sys
from types import SimpleNamespace

import pytest

from trainer.cli import hub
from trainer.config import ConfigError, load


@pytest.fixture
def fetched(monkeypatch):
    """Names that the hub and `datasets` were asked for."""
    asked = []
    files = {"a/policy": ["config.json", "model.safetensors", "pytorch_model.bin"]}

    def snapshot_download(name, allow_patterns):
        asked.append((name, *allow_patterns[len(hub.SETTINGS) :]))

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"prompt": "a"}]

    fake = SimpleNamespace(
        list_repo_files=lambda name: files.get(name, ["pytorch_model.bin"]),
        snapshot_download=snapshot_download,
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    return asked


NAMED = [
    *("model.policy=a/policy", "model.reward=b/reward", "model.critic=policy"),
    *("data.demonstrations=c/told:train", "data.prompts=d/asked#some:test", "data.pairs=e/pairs"),
]


def test_models_and_the_data_of_the_stages(fetched, tmp_path):
    local = f"data.eval_prompts={tmp_path / 'some.jsonl'}"
    hub.fetch(load("toy", [*NAMED, local]), ("sft", "ppo"))
    assert fetched == [
        ("a/policy", "*.safetensors"),
        ("b/reward", "*.bin"),
        ("c/told", None, "train"),
        ("d/asked", "some", "test"),
    ]


def test_every_one_of_several_sources(fetched, tmp_path):
    several = f"data.prompts=[{{source: d/asked}}, {{source: {tmp_path}/a.jsonl}}, {{source: f/g}}]"
    assert hub.names(load("toy", [several]), ("ppo",)) == {
        "data.prompts[0].source": "d/asked",
        "data.prompts[2].source": "f/g",
    }
    hub.fetch(load("toy", [several]), ("ppo",))
    assert [name for name, *_ in fetched] == ["d/asked", "f/g"]


def test_nothing_is_asked_for_what_is_here_or_without_a_network(fetched, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: 1 / 0)
    hub.fetch(load("toy"), ("sft", "rm", "ppo", "metarm", "eval"))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    hub.fetch(load("toy", NAMED), ("sft", "rm", "ppo"))
    assert fetched == []


def test_what_fails_is_one_line(fetched, monkeypatch):
    monkeypatch.setattr(hub, "_fetch_model", lambda source: 1 / 0)
    with pytest.raises(ConfigError, match=r"^a/policy: model.policy: cannot be fetched: "):
        hub.fetch(load("toy", NAMED), ("sft",))
