"""From parts to token ids, all rows in one call of the tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.batch.types import Messages
from trainer.config import Config
from trainer.data.errors import DataError, first_line
from trainer.data.formats import HUMAN, parse_dialogue
from trainer.runs.names import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


# Names of tokens that models keep for such a use, the likeliest first.
RESERVED = (r"<\|?.*pad.*\|?>|\[PAD\]", r"<\|?.*(reserved|unused|extra).*\|?>|\[unused\d+\]")


def ready(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same with a pad token: one that is kept for it, a reserved one, or EOS.

    It only fills up rows. Masks come from lengths, so that an EOS that ends an answer stays one.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        special = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
        kept = (
            name
            for pattern in RESERVED
            for name, _ in special
            if re.fullmatch(pattern, name, re.IGNORECASE)
        )
        tokenizer.pad_token = next(kept, tokenizer.eos_token)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"model.policy: {name}: its tokenizer has no eos_token, which is needed to know where "
            "an answer ends; name one in its tokenizer_config.json"
        )
    ready(tokenizer)


class Encoded(NamedTuple):
    text: str
    ids: list[int]
    messages: Messages | None
    """What the text was made of by the chat template."""


def encode_prompts(
    parts: Sequence[str | Messages],
    rows: Sequence[tuple[str, Any]],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Encoded]:
    data = config.data
    texts: list[str] = []
    said: list[str] = []
    messages: list[Messages | None] = []
    for part, (where, _) in zip(parts, rows):
        if isinstance(part, str) and data.parse_dialogues and HUMAN in f"\n\n{part}":
            part = parse_dialogue(part)
        empty = not (part if isinstance(part, list) else part.strip())
        if empty or (isinstance(part, list) and not any(each["content"].strip() for each in part)):
            raise DataError(f"{where}: empty prompt")
        said.append(" ".join(m["content"] for m in part) if isinstance(part, list) else part)
        if isinstance(part, str) and data.as_messages:
            part = [{"role": "user", "content": part}]
        if isinstance(part, str) and (data.system_prompt or data.template_kwargs):
            which = "system_prompt" if data.system_prompt else "template_kwargs"
            raise DataError(
                f"{where}: data.{which} is for messages, and this prompt is plain text; "
                "data.as_messages=true makes a user's message of it"
            )
        if isinstance(part, list) and data.system_prompt and part[0]["role"] != "system":
            part = [{"role": "system", "content": data.system_prompt}, *part]
        messages.append(part if isinstance(part, list) else None)
        texts.append(part if isinstance(part, str) else _template(part, where, tokenizer, config))
    tell_special_tokens(said, "prompts", tokenizer)
    # A template writes its own special tokens; plain text gets what the tokenizer puts in front.
    encoded: list[list[int]] = [[]] * len(texts)
    for special in (True, False):
        index = [i for i, each in enumerate(messages) if (each is None) == special]
        if index:
            ids = tokenizer([texts[i] for i in index], add_special_tokens=special, verbose=False)
            for i, each in zip(index, ids["input_ids"]):
                encoded[i] = (
                    each[:-1] if each[-1:] == [tokenizer.eos_token_id] and special else each
                )
    for (where, _), ids in zip(rows, encoded):
        if not ids:
            raise DataError(f"{where}: empty prompt: the tokenizer makes no token of it")
    return [Encoded(*each) for each in zip(texts, encoded, messages)]


def shortened(prompt: Encoded, config: Config, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """With too_long=truncate_left: its end, and the text of that."""
    limit = config.data.max_prompt_tokens
    if config.data.too_long != "truncate_left" or len(prompt.ids) <= limit:
        return prompt
    ids = prompt.ids[-limit:]
    return Encoded(tokenizer.decode(ids), ids, prompt.messages)


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


def _template(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, config: Config
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.data.template_kwargs
        )
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
