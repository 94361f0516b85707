"""Models on the disk: whole ones in Hugging Face format, adapters in PEFT's, or merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import parallel
from trainer.models import adapters
from trainer.models.backbone import Through, Use, adapter_of, merged_weights, unties
from trainer.runs import files


@contextmanager
def quietly() -> Iterator[None]:
    """Hugging Face announces every load, save and new head; all are expected here."""
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def save(
    model: PreTrainedModel,
    through: Through,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    heads: Sequence[nn.Module] = (),
) -> None:
    """What is trained of a model of ours: all of it in `dtype`, or its adapter and heads in
    float32. With a manifest; written aside and renamed: see `runs.files`."""
    if isinstance(through, Use):
        save_adapter(model, through, path, tokenizer, heads)
    else:
        save_pretrained(model, path, tokenizer, dtype, heads)


def save_pretrained(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    heads: Sequence[nn.Module] = (),  # these stay in float32
) -> None:
    """In Hugging Face format."""
    state, exact = {}, {id(p) for head in heads for p in head.parameters()}
    for name, p in model.named_parameters():  # tied ones once
        full = parallel.whole(p.detach())  # every rank has to ask
        if parallel.is_main():
            state[name] = full.cpu() if id(p) in exact else full.to("cpu", dtype)
    if parallel.is_main():
        aside = files.aside_of(path)
        with quietly():
            buffers = dict(model.named_buffers())
            state |= {name: x for name, x in model.state_dict().items() if name in buffers}
            model.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
        files.seal(aside)
        files.replace(aside, path)
    parallel.barrier()


def save_adapter(
    model: PreTrainedModel,
    use: Use,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[nn.Module] = (),
) -> None:
    """In PEFT's format, with the settings of the model that it makes of the base."""
    assert use.adapter is not None
    if parallel.is_main():
        aside = files.aside_of(path)
        aside.mkdir(parents=True)
        weights = adapter_weights(model, use.adapter)
        theirs = {id(p) for head in heads for p in head.parameters()}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in theirs]
        settings = copy.copy(use.backbone.settings[use.adapter])
        if named:
            settings.modules_to_save = sorted({name.partition(".")[0] for name, _ in named})
        weights |= {name: p.detach().cpu() for name, p in named}
        base = use.backbone.base
        with quietly():
            adapters.write(aside, weights, settings, base)
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            if unties(model, use.adapter):
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        files.seal(aside, base=base._asdict())
        files.replace(aside, path)
    parallel.barrier()


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """On the CPU, by the names that PEFT's files have them under."""
    named = adapter_of(model, adapter).items()
    return {name.replace(f".{adapter}", ""): p.detach().cpu() for name, p in named}


def save_merged(
    model: PreTrainedModel,
    adapter: str | None,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Base and adapter as one model in Hugging Face format."""
    state = {}
    for name, full in merged_weights(model, adapter):  # every rank has to ask
        if parallel.is_main():
            state[name] = full.to("cpu", dtype)
    if parallel.is_main():
        with torch.device("meta"), quietly():
            config = copy.deepcopy(model.config)
            if unties(model, adapter):
                config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            plain = type(model)(config)
        plain.generation_config = model.generation_config
        kept = plain.state_dict()
        state |= {n: b.cpu() for n, b in model.named_buffers() if n in kept}
        aside = files.aside_of(path)
        with quietly():
            plain.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
        files.seal(aside)
        files.replace(aside, path)
    parallel.barrier()
