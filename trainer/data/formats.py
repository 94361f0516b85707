"""What a row says, before any tokenizer: prompts are text or messages, answers are text."""

from __future__ import annotations

import itertools
import re
from typing import Any

from trainer.batch.types import Messages
from trainer.config import Columns
from trainer.data.errors import DataError

RESPONSES = ("response", "completion", "label")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def prompt_of(row: dict[str, Any], columns: Columns, where: str) -> str | Messages:
    prompt = pick(row, columns.prompt)
    if prompt is not None:
        return _part(prompt, columns.prompt, where)
    messages = pick(row, columns.messages)
    if messages is not None:
        messages = _messages(messages, columns.messages, where)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if _is_tldr(row):
        return _tldr_prompt(row["info"], where)
    if pick(row, columns.chosen) is not None:
        return (
            pair_of(row, columns, where)[0]
            if pick(row, columns.rejected) is not None
            else _split_one(pick(row, columns.chosen), columns.chosen, where)[0]
        )
    raise _missing(row, f"{columns.prompt} or {columns.messages}", where)


def demonstration_of(
    row: dict[str, Any], columns: Columns, where: str
) -> tuple[str | Messages, str]:
    if _is_tldr(row):
        post, better, _ = _tldr_pair(row, where)
        return post, better
    names = (columns.response,) if columns.response else RESPONSES
    response = next((name for name in names if pick(row, name) is not None), None)
    if response is not None:
        prompt = prompt_of(row, columns, where)
        return _answer_after(prompt, _part(pick(row, response), response, where), response, where)
    for name in (columns.messages, columns.chosen):
        if pick(row, name) is not None:
            return _split_one(pick(row, name), name, where)
    raise _missing(row, " or ".join([*names, columns.messages]), where)


def pair_of(row: dict[str, Any], columns: Columns, where: str) -> tuple[str | Messages, str, str]:
    """(prompt, chosen, rejected). Without a prompt column the common prefix is the prompt."""
    if _is_tldr(row):
        return _tldr_pair(row, where)
    values = []
    for name in (columns.chosen, columns.rejected):
        value = pick(row, name)
        if value is None:
            raise _missing(row, name, where)
        values.append(_part(value, name, where))
    chosen, rejected = values
    if type(chosen) is not type(rejected):
        raise DataError(f"{where}: {columns.rejected}: want the same form as {columns.chosen}")
    prompt = pick(row, columns.prompt)
    # Whole dialogues carry their prompt; a prompt column beside them repeats it as text.
    if isinstance(chosen, list) and len(chosen) > 1:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared]
    elif prompt is None:
        prompt = ""
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt = _common_prefix(chosen, rejected)
    prompt = _part(prompt, columns.prompt, where)
    _, better = _answer_after(prompt, chosen, columns.chosen, where)
    _, worse = _answer_after(prompt, rejected, columns.rejected, where)
    return prompt, better, worse


def _split_one(value: Any, name: str, where: str) -> tuple[str | Messages, str]:
    """Prompt and answer of one whole dialogue."""
    dialogue = _part(value, name, where)
    if isinstance(dialogue, list):
        if dialogue[-1]["role"] != "assistant" or len(dialogue) < 2:
            raise DataError(f"{where}: {name}: want messages that end in one of role assistant")
        return dialogue[:-1], dialogue[-1]["content"]
    cut = dialogue.rfind(ASSISTANT)
    if cut < 0:
        raise DataError(
            f"{where}: {name}: no prompt column, and no '\\n\\nAssistant:' to find the prompt by"
        )
    cut += len(ASSISTANT)
    return dialogue[:cut], dialogue[cut:]


def _answer_after(
    prompt: str | Messages, answer: str | Messages, name: str, where: str
) -> tuple[str | Messages, str]:
    """The answer's own text, without the prompt it may carry in front."""
    if isinstance(answer, str):
        carries = isinstance(prompt, str) and prompt and answer.startswith(prompt)
        return prompt, answer[len(prompt) :] if carries else answer
    own = answer[len(prompt) :] if isinstance(prompt, list) and answer[:-1] == prompt else answer
    if len(own) != 1 or own[0]["role"] != "assistant":
        raise DataError(
            f"{where}: {name}: want one message of role assistant after the prompt, got roles "
            f"{[message['role'] for message in own]}"
        )
    return prompt, own[0]["content"]


def _common_prefix(chosen: str, rejected: str) -> str:
    n = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected)))
    cut = chosen.rfind(ASSISTANT, 0, n)
    if cut >= 0:
        return chosen[: cut + len(ASSISTANT)]
    # Back to the end of a word: "the answer is ye|s" and "ye|p" share "the answer is".
    whole_word = all(text[n : n + 1].isspace() or n == len(text) for text in (chosen, rejected))
    shared = chosen[:n] if whole_word else re.sub(r"\S+$", "", chosen[:n])
    return shared.rstrip()


def _is_tldr(row: dict[str, Any]) -> bool:
    """openai/summarize_from_feedback, as it was released."""
    return isinstance(row.get("info"), dict) and "summaries" in row


def _tldr_prompt(info: dict[str, Any], where: str) -> str:
    post = info.get("post") or info.get("article")
    if not post:
        raise DataError(f"{where}: info.post: missing")
    head = "".join(
        f"{label}: {prefix}{info[key]}\n\n"
        for label, prefix, key in (("SUBREDDIT", "r/", "subreddit"), ("TITLE", "", "title"))
        if info.get(key)
    )
    return f"{head}POST: {post}\n\nTL;DR:"


def _tldr_pair(row: dict[str, Any], where: str) -> tuple[str, str, str]:
    summaries, choice = row.get("summaries"), row.get("choice")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise DataError(f"{where}: summaries: want two of them")
    if choice not in (0, 1):
        raise DataError(f"{where}: choice: is {choice!r}; want 0 or 1")
    said = [pick(each, "text") if isinstance(each, dict) else None for each in summaries]
    texts = [text for text in said if isinstance(text, str)]
    if len(texts) != 2:
        raise DataError(f"{where}: summaries: want a text in each")
    # The released texts begin with a space, as what follows "TL;DR:" should.
    texts = [text if text[:1].isspace() else f" {text}" for text in texts]
    return _tldr_prompt(row["info"], where), texts[choice], texts[1 - choice]


# Values of a row, checked.


def pick(row: dict[str, Any], column: str) -> Any:
    """row["a.b"], or else row["a"]["b"]; None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _missing(row: dict[str, Any], wanted: str, where: str) -> DataError:
    return DataError(f"{where}: no column {wanted}; there are {', '.join(map(str, row)) or 'none'}")


def number(row: dict[str, Any], column: str, where: str) -> float | None:
    value = pick(row, column)
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not abs(value) < 1e30:  # false for NaN
        raise DataError(f"{where}: {column}: is {str(value)[:80]}; want a number below 1e30")
    return float(value)


def _part(value: Any, name: str, where: str) -> str | Messages:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(value, name, where)
    raise DataError(f"{where}: {name}: is {type(value).__name__}; want text or a list of messages")


def _messages(value: Any, name: str, where: str) -> Messages:
    good = isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("role"), str)
        and isinstance(each.get("content"), str)
        for each in value
    )
    if not good:
        raise DataError(f"{where}: {name}: want messages, each with a role and a content as text")
    if not value:
        raise DataError(f"{where}: {name}: no messages")
    return [{"role": each["role"], "content": each["content"]} for each in value]


def parse_dialogue(text: str) -> Messages:
    """Messages of "\\n\\nHuman: ... \\n\\nAssistant: ..." text, without an unfinished last turn."""
    pieces = re.split(r"\n\n(Human|Assistant):", f"\n\n{text.lstrip()}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(pieces[1::2], pieces[2::2])
    ]
    return turns[:-1] if turns and turns[-1]["content"] == "" else turns
