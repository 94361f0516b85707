"""Models on the disk, in Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import parallel
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


def save_pretrained(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    heads: Sequence[nn.Module] = (),  # these stay in float32
) -> None:
    """In Hugging Face format, with a manifest; written aside and renamed: see `runs.files`."""
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
