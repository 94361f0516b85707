"""From parts to token ids, all rows in one call of the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.batch.types import Messages
from trainer.config import Config
from trainer.data.errors import DataError, first_line
from trainer.data.formats import HUMAN, parse_dialogue
from trainer.runs.names import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for token, use in (("pad", "fill up short rows"), ("eos", "know where an answer ends")):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise DataError(
                f"model.policy: {name}: its tokenizer has no {token}_token, which is needed to "
                f"{use}; name one in its tokenizer_config.json"
            )


def encode_prompts(
    parts: Sequence[str | Messages],
    rows: Sequence[tuple[str, Any]],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, list[int]]]:
    texts, templated, said = [], [], []
    for part, (where, _) in zip(parts, rows):
        if isinstance(part, str) and config.data.parse_dialogues and HUMAN in f"\n\n{part}":
            part = parse_dialogue(part)
        empty = not (part if isinstance(part, list) else part.strip())
        if empty or (isinstance(part, list) and not any(each["content"].strip() for each in part)):
            raise DataError(f"{where}: empty prompt")
        said.append(" ".join(m["content"] for m in part) if isinstance(part, list) else part)
        templated.append(isinstance(part, list))
        texts.append(_template(part, where, tokenizer) if isinstance(part, list) else part)
    tell_special_tokens(said, "prompts", tokenizer)
    # A template writes its own special tokens; plain text gets what the tokenizer puts in front.
    encoded: list[list[int]] = [[]] * len(texts)
    for special in (True, False):
        index = [i for i, by_template in enumerate(templated) if by_template != special]
        if index:
            ids = tokenizer([texts[i] for i in index], add_special_tokens=special, verbose=False)
            for i, each in zip(index, ids["input_ids"]):
                encoded[i] = (
                    each[:-1] if each[-1:] == [tokenizer.eos_token_id] and special else each
                )
    for (where, _), ids in zip(rows, encoded):
        if not ids:
            raise DataError(f"{where}: empty prompt: the tokenizer makes no token of it")
    return list(zip(texts, encoded))


def encode_answers(
    texts: Sequence[str], config: Config, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    if config.data.parse_dialogues:
        texts = [text.strip() for text in texts]
    if not texts:
        return []
    tell_special_tokens(texts, "answers", tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*each, tokenizer.eos_token_id] for each in ids]


def tell_special_tokens(
    texts: Sequence[str], what: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Text like <|im_end|> becomes the control token that it spells: an answer ends in its middle,
    a user speaks as the assistant. Some data is so on purpose, hence told and not refused."""
    special = [token for token in getattr(tokenizer, "all_special_tokens", []) if token]
    found = [(i, t) for i, text in enumerate(texts) for t in special if t in text]
    rows = len({i for i, _ in found})
    if rows:
        first, token = found[0]
        log.warning(
            "data: %d of %d %s spell special tokens, which count as such: the first is %s in row "
            "%d", rows, len(texts), what, one_line(token), first + 1,
        )  # fmt: skip


def _template(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template refuses it: {first_line(error)}") from None


def fits(ids: list[int], limit: int, what: str, where: str, config: Config) -> bool:
    if limit == 0 or len(ids) <= limit:
        return True
    if config.data.too_long == "error":
        raise DataError(
            f"{where}: {what} of {len(ids)} tokens is over data.max_{what}_tokens={limit} "
            "(data.too_long=drop leaves such rows out)"
        )
    return False
