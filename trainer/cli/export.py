"""`gi export RUN`: a model that a run has made, as a folder that others load.

An adapter comes as PEFT reads it, or merged into its base; a whole model as Hugging Face reads it.
Figures that a merged model gives are those of the adapter but for the rounding of one addition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import config as settings
from trainer.config import ConfigError
from trainer.runs import files
from trainer.runs.console import say
from trainer.runs.folder import RunFolder

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MODELS = ("policy", "rm", "sft")


def run(folder: str, names: list[str], merge: bool, dtype: str, output: str) -> int:
    run = RunFolder(folder)
    if len(names) > 1 or any(name not in MODELS for name in names):
        raise ConfigError(f"want one of {', '.join(MODELS)}", where=" ".join(names))
    name = names[0] if names else MODELS[0]
    dtype = DTYPES.get(dtype, dtype)
    if dtype and dtype not in DTYPES.values():
        raise ConfigError(f"want one of {', '.join(DTYPES)}", "--dtype", dtype)
    source = run.model(name)
    if not source.is_dir() or not run.config.is_file():
        raise ConfigError(f"no run folder with a model {name}: {source} is not there", where=folder)
    target = Path(output or run.path / "export" / name)
    if target.exists():
        raise ConfigError(
            "is there already: choose another --output, or delete it", where=str(target)
        )
    files.refuse_damage(source, "put back a copy")
    from trainer.models import adapters

    target.parent.mkdir(parents=True, exist_ok=True)
    if adapters.is_adapter(str(source)) and not merge:
        _adapter(str(source), target, dtype)
        kind = "adapter, for PeftModel.from_pretrained"
    else:
        kind = _whole(str(source), name, settings.load(str(run.config)), target, dtype)
    say(f"{target}: {kind}")
    return 0


def _adapter(source: str, target: Path, dtype: str) -> None:
    """PEFT's files and the tokenizer, without what is ours alone."""
    import torch
    from safetensors.torch import load_file, save_file

    from trainer.models import adapters

    aside = files.aside_of(target)
    aside.mkdir()
    for name in files.names_in(Path(source)):
        (aside / name).write_bytes(Path(source, name).read_bytes())
    base = adapters.base_of(source)
    said = adapters.settings_of(source)
    said["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    files.write_json(aside / adapters.SETTINGS, said)
    if dtype:
        weights = load_file(aside / adapters.WEIGHTS)
        cast = {name: x.to(getattr(torch, dtype)) for name, x in weights.items()}
        save_file(cast, aside / adapters.WEIGHTS, metadata={"format": "pt"})
    files.seal(aside, base=files.manifest(Path(source))["base"])
    files.replace(aside, target)


def _whole(source: str, name: str, config: Any, target: Path, dtype: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from trainer.models import loading
    from trainer.models.saving import save_pretrained

    auto = AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM
    kind = getattr(torch, dtype or config.model.dtype)
    model = loading.load(auto, source, config)
    tokenizer = loading.load_tokenizer(source, config)
    save_pretrained(model, target, tokenizer, kind)
    return f"{auto.__name__}, {kind}"
