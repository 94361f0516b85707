"""Before a run: everything it needs is there, or an error of one line names the first thing wrong.

Models' configurations, tokenizer, data and reward functions are read; nothing is written and no
weights are loaded. Only a dry run puts up with what a network would have to bring; it says what it
could not check.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trainer.batch.types import Pair, Prompt
from trainer.cli import hub
from trainer.cli.memory import PUBLISHED, Shape, planned_ranks, published, shape_of
from trainer.config import Config, ConfigError
from trainer.data.encode import check_tokenizer
from trainer.data.errors import DataError, first_line
from trainer.data.files import FILES
from trainer.data.sources import load_demonstrations, load_pairs, load_prompts
from trainer.worlds import registry

if TYPE_CHECKING:  # the hub's library reads HF_HUB_OFFLINE when it is imported, and not again
    from transformers import PreTrainedTokenizerBase

Row = Prompt | Pair | tuple[list[int], list[int]]
R = TypeVar("R", bound=Row)


@dataclass
class Checked:
    """What the check found out, for the description of the plan."""

    rows: dict[str, str] = field(default_factory=dict)
    """Data source -> how many rows and tokens."""
    notes: list[str] = field(default_factory=list)
    """What a dry run could not check here."""
    policy: Shape | None = None
    reward: Shape | None = None


def check(config: Config, stages: Sequence[str], dry_run: bool = False) -> Checked:
    found = Checked()
    _need_packages(config, found, dry_run)
    _need_vllm(config, found, dry_run)
    if hub.names(config, stages) and not hub.reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"  # fail (or find the local copy) at once, not in 25 s
    import transformers

    transformers.logging.set_verbosity_error()
    found.policy = _shape("model.policy", config.model.policy, config, found, dry_run)
    if config.model.reward and "ppo" in stages:
        found.reward = _shape("model.reward", config.model.reward, config, found, dry_run)
    if config.model.reference:
        _shape("model.reference", config.model.reference, config, found, dry_run)
    if config.model.critic not in ("reward", "policy"):
        _shape("model.critic", config.model.critic, config, found, dry_run)
    _need_models_of_earlier_stages(config, stages)

    from trainer.models import loading

    loading.check_attention(config)
    try:
        tokenizer = loading.load_tokenizer(config.model.policy, config)
    except Exception as error:  # transformers, the hub, a broken file
        problem = f"no tokenizer: {first_line(error)}"
        if not dry_run:
            raise ConfigError(problem, "model.policy", config.model.policy) from None
        found.notes.append(f"model.policy: {config.model.policy}: {problem}; data not checked")
        _need_local_files(config, stages)
        return found
    check_tokenizer(tokenizer, config.model.policy)
    _check_data(config, stages, tokenizer, found, dry_run)
    return found


def _check_data(
    config: Config,
    stages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    found: Checked,
    dry_run: bool,
) -> None:
    if dry_run:  # it writes nothing
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="none"))

    def rows_of(key: str, load: Callable[[], Sequence[R]]) -> Sequence[R]:
        try:
            rows = load()
        except DataError as error:
            # Only what is not on this machine can be let pass.
            names = [each.source for each in config.data.sources(key)]
            if dry_run and "cannot be loaded" in str(error) and any(map(hub.is_name, names)):
                found.notes.append(str(error))
                return []
            raise
        if rows:
            found.rows[key] = _count(rows)
        return rows

    data = config.data
    if "sft" in stages:
        rows_of("demonstrations", lambda: load_demonstrations(config, tokenizer))
    if {"rm", "metarm"} & set(stages) and registry.is_text_world(data.pairs):
        raise DataError(f"data.pairs: {data.pairs}: this world has no annotators; want other pairs")
    if {"rm", "metarm"} & set(stages) and not registry.is_world(data.pairs):
        pairs = rows_of("pairs", lambda: load_pairs(config, tokenizer))
        _need_columns(config, pairs)
    if {"ppo", "metarm", "eval"} & set(stages):
        prompts = rows_of("eval_prompts", lambda: load_prompts(config, "eval", tokenizer))
        rows_of("ood_prompts", lambda: load_prompts(config, "ood", tokenizer))
        if {"ppo", "metarm"} & set(stages):
            prompts = rows_of("prompts", lambda: load_prompts(config, "train", tokenizer))
            if config.groups.inference == "oracle" and any(p.domain is None for p in prompts):
                raise DataError(
                    f"data.prompts: {named(config, 'prompts')}: groups.inference=oracle wants a "
                    f"domain for each prompt, in column {data.columns.domain}"
                )
        if config.reward.functions:
            from trainer.rewards import functions

            functions.check_functions(config, prompts)


def _need_columns(config: Config, pairs: Sequence[Pair]) -> None:
    if not pairs:
        return
    if config.rm.margin and any(pair.margin is None for pair in pairs):
        raise DataError(
            f"data.pairs: {named(config, 'pairs')}: rm.margin=true wants column "
            f"{config.data.columns.margin} in every row"
        )
    if config.rm.rating and any(
        pair.rating_chosen is None or pair.rating_rejected is None for pair in pairs
    ):
        name = config.data.columns.rating
        raise DataError(
            f"data.pairs: {named(config, 'pairs')}: rm.rating > 0 wants columns {name}_chosen and "
            f"{name}_rejected in every row"
        )


def _need_packages(config: Config, found: Checked, dry_run: bool) -> None:
    wanted = [(f"trainer.log={name}", name, f"pip install {name}") for name in config.trainer.log]
    if config.model.attention.startswith("flash_attention"):
        wanted.append(
            (f"model.attention={config.model.attention}", "flash_attn", "pip install flash-attn")
        )
    if config.lora.active:
        wanted.append((f"lora.rank={config.lora.rank}", "peft", "pip install peft"))
    if config.lora.quantize == "nf4":
        wanted.append(("lora.quantize=nf4", "bitsandbytes", "pip install bitsandbytes"))
    for setting, module, how in wanted:
        if importlib.util.find_spec(module) is None:
            problem = f"{module} is not installed: {how}"
            if not dry_run:
                raise ConfigError(problem, where=setting)
            found.notes.append(f"{setting}: {problem}")


def _need_vllm(config: Config, found: Checked, dry_run: bool) -> None:
    if config.rollout.engine != "vllm":
        return
    share = config.rollout.tensor_parallel
    ranks = planned_ranks(config) if dry_run else int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % share:
        raise ConfigError(
            f"is {share}; want a divisor of the number of ranks, {ranks}",
            "rollout.tensor_parallel",
        )
    if importlib.util.find_spec("vllm") is None:
        problem = "vllm is not installed: pip install -c constraints-vllm.txt -e '.[vllm]'"
        if not dry_run:
            raise ConfigError(problem, where="rollout.engine=vllm")
        found.notes.append(f"rollout.engine=vllm: {problem}")


def _need_models_of_earlier_stages(config: Config, stages: Sequence[str]) -> None:
    """A stage that starts alone needs what an earlier one has left in the run folder."""
    if "sft" in stages:
        return
    from trainer.models import sources
    from trainer.runs.folder import RunFolder

    run = RunFolder(config.run.output)
    sources.policy_source(config, run)
    if {"ppo", "eval"} & set(stages) and "rm" not in stages and config.reward.model_weight:
        sources.reward_source(config, run)
    if "metarm" in stages and not {"rm", "ppo"} & set(stages):
        for stage in ("rm", "ppo"):
            sources.made_by(stage, run)


def _need_local_files(config: Config, stages: Sequence[str]) -> None:
    """What can be said of data without a tokenizer: whether the files are there."""
    for key in dict.fromkeys(key for stage in stages for key in hub.DATA[stage]):
        for source in (each.source for each in config.data.sources(key)):
            if source.endswith(FILES) and not Path(source).is_file():
                raise DataError(f"data.{key}: {source}: no such file")


def _shape(key: str, source: str, config: Config, found: Checked, dry_run: bool) -> Shape | None:
    if registry.is_world(source):
        return shape_of(registry.base(source, config).model_config(), source)
    if hub.is_path(source) and not Path(source).exists():
        raise ConfigError("no such file or folder", key, source)
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(
            source, trust_remote_code=config.model.trust_remote_code
        )
    except Exception as error:  # the hub, the network, a broken file
        problem = f"cannot be resolved: {first_line(error)}"
        if not dry_run or hub.is_path(source):
            raise ConfigError(problem, key, source) from None
        known = PUBLISHED.get(source)
        also = "its published architecture is used" if known else "no memory estimate"
        found.notes.append(f"{key}: {source} {problem}; {also}")
        return published(source) if known else None
    return shape_of(loaded, source)


def named(config: Config, key: str) -> str:
    """Where the rows of data.<key> come from."""
    sources = config.data.sources(key)
    if len(sources) == 1:
        return sources[0].source
    return ", ".join(f"{each.source} (weight {each.weight:g})" for each in sources)


def _count(rows: Sequence[Row]) -> str:
    """How many rows, and their tokens."""

    def tokens(row: Row) -> int:
        if isinstance(row, tuple):
            return len(row[0]) + len(row[1])
        if isinstance(row, Prompt):
            return len(row.ids)
        return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))

    counts = [tokens(row) for row in rows]
    return f"{len(rows)} rows, {sum(counts) / len(counts):.0f} tokens each, at most {max(counts)}"
