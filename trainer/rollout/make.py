"""The engine that the configuration asks for."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.rollout.engine import Engine


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> Engine:
    if config.rollout.engine == "hf":
        from trainer.rollout.hf import HuggingFaceEngine

        return HuggingFaceEngine(config, tokenizer)
    from trainer.rollout.vllm import VllmEngine

    return VllmEngine(config, tokenizer)
