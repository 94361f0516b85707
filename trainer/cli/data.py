"""What a source of rows is good for, found out from its first rows: `gi init` asks nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.batch.types import Messages
from trainer.cli.hub import is_name
from trainer.config import Columns, ConfigError
from trainer.data.errors import DataError
from trainer.data.files import FILES, read_rows
from trainer.data.formats import demonstration_of, pair_of, prompt_of

ROWS = 256
"""Rows that are looked at."""
LETTERS = 3.5
"""Characters of a token of English, about; where the tokenizer is not on this machine."""
LEFT_OUT = 100
"""The longest 1 of so many may be dropped."""
HELD_OUT = ("test", "eval", "validation", "valid", "dev")


@dataclass(frozen=True)
class Found:
    source: str
    rows: int
    kinds: tuple[str, ...]
    """Of demonstrations, pairs; all rows have prompts."""
    chosen: str
    """The column that has demonstrations, where they are the better answers of pairs."""
    has_answer: bool
    """A column `answer`, and no pairs."""
    prompt_tokens: int
    answer_tokens: int
    """0: there are no answers to measure."""
    held_out: str
    """Prompts for the evaluation; the source itself, where there is nothing else."""

    @property
    def said(self) -> str:
        kinds = ", ".join([*self.kinds, "prompts", *(["right answers"] if self.has_answer else [])])
        return f"{self.source} has {kinds} (its first {self.rows} rows)"

    def settings(self, given: Sequence[str]) -> dict[str, Any]:
        """section.key -> value. `given`: overrides, which may say what an answer is worth."""
        told = any(each.startswith(("model.reward=", "reward.functions=")) for each in given)
        if "pairs" not in self.kinds and not self.has_answer and not told:
            raise ConfigError(
                "has neither pairs nor a column answer; say what an answer is worth: "
                "model.reward=MODEL or 'reward.functions=[{function: package.module:name}]' "
                "(gi keys reward.functions)",
                "--data",
                self.source,
            )
        stages = ["sft"] if "demonstrations" in self.kinds else []
        trains_rm = "pairs" in self.kinds and not told
        stages += ["rm", "ppo"] if trains_rm else ["ppo"]
        out: dict[str, Any] = {"run.stages": stages}
        if not trains_rm and not any(each.startswith("model.reward=") for each in given):
            out |= {"model.critic": "policy", "reward.model_weight": 0}
            if not told:
                out["reward.functions"] = [{"function": "math"}]
        for kind in self.kinds:
            out[f"data.{kind}"] = self.source
        if self.chosen:
            with_columns = {"source": self.source, "columns": {"response": self.chosen}}
            out["data.demonstrations"] = [with_columns]
        out |= {
            "data.prompts": self.source,
            "data.eval_prompts": self.held_out,
            "data.ood_prompts": "",
            "data.eval_limit": 256,
            "data.max_prompt_tokens": self.prompt_tokens,
            "data.too_long": "drop",
        }
        if self.answer_tokens:
            out["data.max_answer_tokens"] = self.answer_tokens
        return out | {"rollout.max_new_tokens": self.answer_tokens or 256}


def look(source: str, model: str) -> Found:
    try:
        rows = [row for _, row in read_rows(source, "prompts", ROWS)]
    except DataError as error:
        raise ConfigError(str(error).removeprefix("data.prompts: "), "--data") from None
    columns, where = Columns(), source

    def of(
        reader: Callable[[dict[str, Any], Columns, str], Any], columns: Columns = columns
    ) -> list[Any]:
        """What it reads from every row, or nothing."""
        try:
            return [reader(row, columns, where) for row in rows]
        except DataError:
            return []

    pairs, demonstrations, chosen = of(pair_of), of(demonstration_of), ""
    if pairs and not demonstrations:
        chosen = columns.chosen
        demonstrations = of(demonstration_of, Columns(response=chosen))
    try:
        prompts = [prompt_of(row, columns, where) for row in rows]
    except DataError as error:
        raise ConfigError(str(error), "--data") from None
    answers = [answer for _, answer in demonstrations] or [each for p in pairs for each in p[1:]]
    count = counter(model)
    kinds = [("demonstrations", demonstrations), ("pairs", pairs)]
    return Found(
        source=source,
        rows=len(rows),
        kinds=tuple(kind for kind, found in kinds if found),
        chosen=chosen if demonstrations else "",
        has_answer=not pairs and all(row.get("answer") is not None for row in rows),
        prompt_tokens=_most([count(_text(each)) for each in prompts]),
        answer_tokens=_most([count(each) + 1 for each in answers]) if answers else 0,
        held_out=held_out(source),
    )


def _text(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(each["content"] for each in prompt)


def _most(lengths: list[int]) -> int:
    """All but the longest hundredth, in whole 64s, with room for a chat template."""
    ordered = sorted(lengths)
    longest = ordered[len(ordered) - 1 - len(ordered) // LEFT_OUT]
    return -(-(longest + 16) // 64) * 64


def counter(model: str) -> Callable[[str], int]:
    """How many tokens a text has: by the model's tokenizer, where it is on this machine."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=is_name(model))
        return lambda text: len(tokenizer(text)["input_ids"])
    except Exception:  # it is not there, or broken: the plan will say so
        return lambda text: int(len(text) / LETTERS) + 1


def held_out(source: str) -> str:
    """A file beside it called test or the like, or the split of a name; else the source itself."""
    path = Path(source)
    if source.endswith(FILES):
        for word in HELD_OUT:
            for end in FILES:
                stem = path.name.removesuffix(".gz").rpartition(".")[0]
                name = stem.replace("train", word) if "train" in stem else f"{stem}_{word}"
                for beside in (path.with_name(name + end), path.with_name(word + end)):
                    if beside.is_file() and beside != path:
                        return str(beside)
        return source
    name, _, split = source.partition(":")
    if is_name(source) and split in ("", "train"):
        with_test = f"{name}:test"
        try:
            next(read_rows(with_test, "eval_prompts", 1))
            return with_test
        except DataError:
            pass
    return source
