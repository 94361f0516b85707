"""Adapters on the disk, in PEFT's format, and the bases that they belong to.

    adapter_config.json, adapter_model.safetensors     as PeftModel.from_pretrained reads them
    config.json, tokenizer                             of the model that base and adapter make
    manifest.json                                      the base's name and fingerprint

An adapter is worth nothing on another base, and nobody would see it: the fingerprint tells.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer import parallel
from trainer.config import ConfigError
from trainer.runs import files

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts in front of a weight's name in the model."""


class Base(NamedTuple):
    """What adapters are trained on."""

    source: str  # a folder, or a name
    fingerprint: str  # of its weights


def is_adapter(source: str) -> bool:
    return Path(source, SETTINGS).is_file()


def settings_of(source: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(source, SETTINGS).read_text(encoding="utf-8"))
    return said


def base_of(source: str) -> str:
    """Of an adapter's folder; one that was moved with its run has its base beside it."""
    said = settings_of(source)["base_model_name_or_path"]
    beside = Path(source).parent / Path(said).name
    return str(beside) if not Path(said).is_dir() and beside.is_dir() else said


def base(source: str) -> Base:
    """Rank 0 looks, for all."""
    found = fingerprint(source) if parallel.is_main() else ""
    return Base(source, parallel.gather_objects(found)[0])


def fingerprint(source: str) -> str:
    """Of the weights in a model's folder, or of a name on the hub: from names, sizes and checksums
    of the files. A folder of ours has them in its manifest."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True))
    known = files.manifest(folder).get("files", {})
    names = [n for n in files.names_in(folder) if n.endswith((".safetensors", ".bin"))]
    told = [(n, known.get(n) or files.entries(folder, [n])[n]) for n in names]
    return f"{zlib.crc32(json.dumps(told, sort_keys=True).encode()):08x}"


def refuse_other_base(source: str, ours: Base) -> None:
    """Where an adapter says what it was trained on, this has to be it."""
    want = files.manifest(Path(source)).get("base")
    if want and want["fingerprint"] != ours.fingerprint:
        raise ConfigError(
            f"was trained on {want['source']} as it was then (weights {want['fingerprint']}); "
            f"{ours.source} has other weights now ({ours.fingerprint}): put the base back",
            where=source,
        )


def read(source: str) -> dict[str, Tensor]:
    """Name in the model -> weight."""
    weights = load_file(Path(source, WEIGHTS))
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def untie(model: PreTrainedModel, source: str) -> bool:
    """Give a tied head weights of its own where an adapter moves it, or the embeddings; whether it
    did."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    names = {
        n.rpartition(".")[2] for n, each in model.named_modules() if each in (head, embeddings)
    }
    moved = {part for name in read(source) for part in name.split(".")}
    if not names & moved:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return True


def write(folder: Path, weights: dict[str, Tensor], settings: Any, base: Base) -> None:
    """PEFT's files; `settings` are PEFT's own."""
    settings.base_model_name_or_path = base.source
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    named = {PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
