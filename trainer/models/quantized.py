"""A base whose layers have 4 bits a weight, by bitsandbytes. What is added to it has 32, and is
computed with in the dtype of compute, as are the layers themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

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


def settle(model: PreTrainedModel) -> None:
    """A model that was read with these options. What is written of it, an adapter or a merged
    model, is not in 4 bits and must not say so. On some CPUs bitsandbytes would lay the weights out
    for inference, for good, as soon as answers are sampled: they are trained through."""
    del model.config.quantization_config
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def widened(p: nn.Parameter) -> Tensor:
    """A weight as it is computed with, whatever it is kept in."""
    state = getattr(p, "quant_state", None)
    if state is None:
        return p.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(p.detach(), state)
    return whole
