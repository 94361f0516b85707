"""The engine that the configuration asks for."""

from __future__ import annotations

from trainer.rollout.engine import Engine


def make_engine(config, tokenizer) -> Engine:
    if config.rollout.engine == "hf":
        from trainer.rollout.hf import HuggingFaceEngine

        return HuggingFaceEngine(config, tokenizer)
    from trainer.rollout.vllm import VllmEngine

    return VllmEngine(config, tokenizer)
