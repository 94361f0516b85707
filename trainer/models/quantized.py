"""A base whose layers have 4 bits a weight, by bitsandbytes. What is added to it has 32, and is
computed with in the dtype of compute, as are the layers themselves."""

from __future__ import annotations

from typing import Any

from trainer import parallel
from trainer.config import Config


def options_for(config: Config) -> dict[str, Any]:
    """Of from_pretrained; none where the base is not quantised."""
    if config.lora.quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=parallel.compute_dtype(config),
    )
    return {"quantization_config": how, "device_map": {"": parallel.device()}}
