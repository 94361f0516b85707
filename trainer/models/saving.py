"""Models on the disk, in Hugging Face format."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer import parallel
from trainer.runs import files

# --- making them --------------------------------------------------------------------------------


@contextmanager
def quietly():
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


def save_pretrained(model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """In Hugging Face format, with a manifest; written aside and renamed: see `runs.files`."""
    state = {}
    for name, p in model.named_parameters():  # tied ones once
        full = parallel.whole(p.detach())  # every rank has to ask
        if parallel.is_main():
            state[name] = full.cpu()
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
