"""How much memory vLLM gets: a share of a GPU, or a cache of so many bytes."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from trainer.config import Config, ConfigError

LEFT, LEAST = 0.95, 0.02
"""Share of the free memory that vLLM may have, and of all of it under which it cannot start."""


def gpu_share(config: Config) -> float:
    """Of a GPU's memory, for vLLM. Where it takes what is left: all of it but what gathering a
    bucket of weights wants, and a little for CUDA itself."""
    asked = config.rollout.gpu_memory
    if not isinstance(asked, str):
        return asked
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (LEFT * free - 2 * (config.rollout.sync_bucket_mb << 20)) / total
    if share < LEAST:
        raise ConfigError(
            f"auto: of {total / 2**30:.0f} GiB there are {free / 2**30:.1f} left: too little for "
            "an engine; want engine=hf, or models that take less (gi train ... --dry-run)",
            "rollout.gpu_memory",
        )
    return round(share, 3)


def cache_bytes(shape: PreTrainedConfig, longest: int, config: Config) -> int:
    """Room for `rollout.max_num_seqs` answers of full length; on a CPU vLLM cuts the cache into
    blocks of 128."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    token = (
        2 * shape.num_hidden_layers * heads * width * getattr(torch, config.model.dtype).itemsize
    )
    return (config.rollout.max_num_seqs + 2) * -(-longest // 128) * 128 * token
