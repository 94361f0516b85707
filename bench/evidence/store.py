"""What is done already. A result is found by its settings, so a changed setting finds none.

Each finished run is one small file, results/<arm>-seed<k>-<hash>.json, with all the settings that
made it; its run folder is gone by then. The SFT and reward models that arms share stay, as folders
models/<...>/ with a record.json beside them, which is written last.

Settings are those that change a result: not where it is written, on how many threads, or how often
it is saved. A setting that is new in the code counts as unchanged while it has its default, so that
an extension of the trainer does not throw a study away; a new default of an old setting does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import config as settings
from trainer.config import Config

Settings = dict[str, Any]
STAGES = {
    "sft": ("model.", "data.", "toy.", "reasoning.", "sft."),
    "rm": ("model.", "data.", "toy.", "reasoning.", "sft.", "rm.", "rollout."),
}
"""Sections that a stage's result depends on; PPO's depends on those of `POLICY`."""
POLICY = (*STAGES["rm"], "reward.", "ppo.", "groups.", "kl.", "eval.")
PLACES = ("model.policy", "model.reward")
"""Folders of this study, whose settings are in the settings already."""


def settings_of(config: Config, kind: str, disturb: Mapping[str, float] | None = None) -> Settings:
    """What makes a result of this kind (sft, rm, ppo, evaluate) what it is."""
    sections = STAGES.get(kind, POLICY)
    flat = settings.flat(config.to_dict())
    kept = {k: v for k, v in flat.items() if k.startswith(sections) and k not in PLACES}
    disturbed = {f"disturb.{name}": share for name, share in sorted((disturb or {}).items())}
    return {"kind": kind, "run.seed": config.run.seed, **kept, **disturbed}


def changed(wanted: Settings, there: Settings) -> list[str]:
    """`key: there -> wanted` for each setting in which they differ."""
    defaults = settings.flat(Config().to_dict())
    missing = object()
    lines = []
    idle = {"kl.floor", "kl.shape"} if not wanted.get("kl.adaptive", True) else set()
    elsewhere = "toy." if wanted.get("data.prompts") == "reasoning" else "reasoning."
    for key in sorted((wanted.keys() | there.keys()) - idle):  # of idle ones nothing takes notice
        if key.startswith(elsewhere):
            continue
        ours, theirs = wanted.get(key, missing), there.get(key, defaults.get(key, missing))
        if key not in wanted:  # gone from the code: nobody knows what it would mean now
            lines.append(f"{key}: {theirs!r} -> gone")
        elif ours != theirs:
            lines.append(f"{key}: {'unset' if theirs is missing else repr(theirs)} -> {ours!r}")
    return lines


def short_hash(wanted: Settings) -> str:
    text = json.dumps(wanted, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.records: dict[Path, dict] = {}
        for path in sorted([*self.folder.glob("results/*.json"), *self._models("*/record.json")]):
            record = _read(path)
            if record is not None:
                self.records[path] = record

    def find(self, wanted: Settings) -> Path | None:
        """The file of a result with these settings."""
        for path, record in self.records.items():
            there = record["settings"]
            quick = ("kind", "run.seed", "toy.seed")
            if all(there.get(k) == wanted.get(k) for k in quick) and not changed(wanted, there):
                return path
        return None

    def models_folder(self, name: str, seed: int, wanted: Settings) -> Path:
        return self.folder / "models" / f"{_plain(name)}-seed{seed}-{short_hash(wanted)}"

    def run_folder(self, name: str, seed: int, wanted: Settings) -> Path:
        """Where an arm runs; deleted when its result is kept."""
        return self.folder / "running" / f"{_plain(name)}-seed{seed}-{short_hash(wanted)}"

    def result_file(self, name: str, seed: int, wanted: Settings) -> Path:
        stem = f"{_plain(name)}-seed{seed}-{short_hash(wanted)}"
        return self.folder / "results" / f"{stem}.json"

    def keep(self, path: Path, record: dict) -> None:
        """Written aside and renamed: a file of this name is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(record))
        aside.replace(path)
        self.records[path] = record

    def forget(self, path: Path) -> None:
        path.unlink()
        del self.records[path]

    def _models(self, pattern: str) -> list[Path]:
        return list(self.folder.glob(f"models/{pattern}"))


def _plain(name: str) -> str:
    return name.replace("/", "_")


def _read(path: Path) -> dict | None:
    """None for what is no record; nothing of this study leaves one, but a full disk may."""
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and "settings" in record else None
