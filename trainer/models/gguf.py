"""A GGUF file as a Hugging Face folder that can be trained and saved again.

    python -m trainer.models.gguf model.gguf models/mine        # or a package's name, for its own

transformers reads GGUF, but a model that it read so will not be saved: it takes itself for a
quantised one. The weights are already plain numbers by then; they go into a fresh model.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trainer.config import ConfigError
from trainer.models.saving import quietly


def convert(file: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes config, weights in `dtype`, tokenizer with its chat template; the folder again."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("gguf is not installed: pip install gguf", where=str(file))
    with quietly():
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(read)(config).to(dtype)
        fresh.load_state_dict(read.state_dict())
        fresh.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
        )
        fresh.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def found(name: str) -> Path:
    """A file, or the one in the folder of an installed package."""
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ConfigError("no such file", where=name)
        return Path(name)
    package = importlib.util.find_spec(name)
    places = list(package.submodule_search_locations or ()) if package else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if len(files) != 1:
        raise ConfigError(
            f"want a .gguf file, or a package with one; found {len(files)}", where=name
        )
    return files[0]


if __name__ == "__main__":
    print(convert(found(sys.argv[1]), Path(sys.argv[2])))
