"""Before a run: check everything it needs, and say what it will do and how much memory it takes.

`check` reads models' configurations, tokenizer, data and reward functions, and raises an error of
one line at the first thing that is wrong. Nothing is written and no weights are loaded. Only a
dry run puts up with what a network would have to bring; it says what it could not check.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers import PreTrainedTokenizerBase

from trainer.config import Config, ConfigError
from trainer.config.data import KEYS
from trainer.data.encode import check_tokenizer
from trainer.data.errors import DataError
from trainer.data.files import FILES
from trainer.data.sources import load_demonstrations, load_pairs, load_prompts
from trainer.worlds import registry

FP32, ADAM = 4, 8
"""Bytes a weight: masters, gradients and frozen models are float32, AdamW keeps two moments."""

# Published architectures that the packaged configurations name, so that their dry run can plan
# without a network: layers, hidden, query width, key/value width, intermediate, vocabulary, tied.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (24, 896, 896, 128, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 1536, 256, 8960, 151936, True),
    "Qwen/Qwen2.5-7B": (28, 3584, 3584, 512, 18944, 152064, False),
    "meta-llama/Llama-3.2-1B": (16, 2048, 2048, 512, 8192, 128256, True),
    "meta-llama/Llama-3.1-8B": (32, 4096, 4096, 1024, 14336, 128256, False),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on."""

    source: str
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    vocabulary: int
    backbone: int
    """Parameters without the language-model head; with input embeddings."""
    head: int
    """Parameters of the head; 0 where it is tied to the embeddings."""

    @property
    def parameters(self) -> int:
        return self.backbone + self.head


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
    _need_packages(config)
    _need_vllm(config, found, dry_run)
    if _remote(config, stages) and not _hub_reachable():
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

    try:
        tokenizer = loading.load_tokenizer(config.model.policy, config)
    except Exception as error:  # transformers, the hub, a broken file
        problem = f"no tokenizer: {_line(error)}"
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
    dry_run,
) -> None:
    if dry_run:  # it writes nothing
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="none"))

    def rows_of(key: str, load) -> Sequence[Any]:
        try:
            rows = load()
        except DataError as error:
            # Only what is not on this machine can be let pass.
            names = [each.source for each in config.data.sources(key)]
            if dry_run and "cannot be loaded" in str(error) and any(map(_is_name, names)):
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
                    f"data.prompts: {_named(config, 'prompts')}: groups.inference=oracle wants a "
                    f"domain for each prompt, in column {data.columns.domain}"
                )
        if config.reward.functions:
            from trainer.rewards import functions

            functions.check_functions(config, prompts)


def _need_columns(config: Config, pairs: Sequence[Any]) -> None:
    if not pairs:
        return
    if config.rm.margin and any(pair.margin is None for pair in pairs):
        raise DataError(
            f"data.pairs: {_named(config, 'pairs')}: rm.margin=true wants column "
            f"{config.data.columns.margin} in every row"
        )
    if config.rm.rating and any(
        pair.rating_chosen is None or pair.rating_rejected is None for pair in pairs
    ):
        name = config.data.columns.rating
        raise DataError(
            f"data.pairs: {_named(config, 'pairs')}: rm.rating > 0 wants columns {name}_chosen and "
            f"{name}_rejected in every row"
        )


def _need_packages(config: Config) -> None:
    wanted = [(f"trainer.log={name}", name, f"pip install {name}") for name in config.trainer.log]
    if config.model.attention.startswith("flash_attention"):
        wanted.append(
            (f"model.attention={config.model.attention}", "flash_attn", "pip install flash-attn")
        )
    for setting, module, how in wanted:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: {how}", where=setting)


def _need_vllm(config: Config, found: Checked, dry_run: bool) -> None:
    if config.rollout.engine != "vllm":
        return
    share = config.rollout.tensor_parallel
    ranks = _ranks(config) if dry_run else int(os.environ.get("WORLD_SIZE", "1"))
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
    try:
        sources.policy_source(config, run)
        if {"ppo", "eval"} & set(stages) and "rm" not in stages and config.reward.model_weight:
            sources.reward_source(config, run)
        if "metarm" in stages and not {"rm", "ppo"} & set(stages):
            for stage in ("rm", "ppo"):
                sources.made_by(stage, run)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def _need_local_files(config: Config, stages: Sequence[str]) -> None:
    """What can be said of data without a tokenizer: whether the files are there."""
    keys = {
        "sft": ("demonstrations",),
        "rm": ("pairs",),
        "ppo": ("prompts", "eval_prompts", "ood_prompts"),
        "metarm": ("pairs", "prompts", "eval_prompts", "ood_prompts"),
        "eval": ("eval_prompts", "ood_prompts"),
    }
    for key in dict.fromkeys(key for stage in stages for key in keys[stage]):
        for source in (each.source for each in config.data.sources(key)):
            if source.endswith(FILES) and not Path(source).is_file():
                raise DataError(f"data.{key}: {source}: no such file")


# Names on the hub.


def _is_name(source: str) -> bool:
    return (
        source != ""
        and not registry.is_world(source)
        and not source.endswith(FILES)
        and not _is_path(source)
    )


def _is_path(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _remote(config: Config, stages: Sequence[str]) -> bool:
    model, sources = config.model, [each for key in KEYS for each in config.data.sources(key)]
    names = [model.policy, model.reference, model.reward, *(each.source for each in sources)]
    return any(_is_name(name) for name in names)


def _hub_reachable() -> bool:
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


# Shapes.


def _shape(key: str, source: str, config: Config, found: Checked, dry_run: bool) -> Shape | None:
    if registry.is_world(source):
        return shape_of(registry.base(source, config).model_config(), source)
    if _is_path(source) and not Path(source).exists():
        raise ConfigError("no such file or folder", key, source)
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(
            source, trust_remote_code=config.model.trust_remote_code
        )
    except Exception as error:  # the hub, the network, a broken file
        problem = f"cannot be resolved: {_line(error)}"
        if not dry_run or _is_path(source):
            raise ConfigError(problem, key, source) from None
        known = PUBLISHED.get(source)
        also = "its published architecture is used" if known else "no memory estimate"
        found.notes.append(f"{key}: {source} {problem}; {also}")
        return _published(source) if known else None
    return shape_of(loaded, source)


def shape_of(config: Any, source: str) -> Shape:
    """From a transformers configuration; parameters are counted on a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(each.numel() for each in model.parameters())
    backbone = sum(each.numel() for each in model.base_model.parameters())
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        source=source,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * width,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * width,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        backbone=backbone,
        head=whole - backbone,
    )


def _published(source: str) -> Shape:
    layers, hidden, query, key_value, intermediate, vocabulary, tied = PUBLISHED[source]
    biases = query + 2 * key_value if "Qwen2.5" in source else 0
    block = 2 * hidden * query + 2 * hidden * key_value + 3 * hidden * intermediate
    backbone = vocabulary * hidden + layers * (block + biases + 2 * hidden) + hidden
    return Shape(
        source=source,
        layers=layers,
        hidden=hidden,
        query=query,
        key_value=key_value,
        intermediate=intermediate,
        vocabulary=vocabulary,
        backbone=backbone,
        head=0 if tied else vocabulary * hidden,
    )


# Memory.


def memory(config: Config, stage: str, policy: Shape, reward: Shape, ranks: int) -> dict[str, int]:
    """Bytes on one rank by component, at a stage's peak. Weights, gradients and optimiser state
    are spread over the ranks; activations and the generation cache are not.

    An estimate: the allocator's rounding and the libraries' own memory come on top.
    """
    shape = reward if stage in ("rm", "metarm") else policy
    trained = shape.backbone if stage in ("rm", "metarm") else shape.parameters
    out = {
        "weights": FP32 * trained / ranks,
        "gradients": FP32 * trained / ranks,
        "optimiser": ADAM * trained / ranks,
    }
    if stage == "metarm":  # of a round's reward model; its PPO is as stage ppo
        out["theta, kept aside"] = FP32 * trained / ranks
    if stage == "ppo":
        has_reward = config.reward.model_weight != 0
        out["reference"] = FP32 * policy.parameters / ranks
        out["reward model"] = FP32 * reward.backbone / ranks if has_reward else 0
        if config.ppo.has_critic or config.groups.inference in ("exact", "adversarial"):
            body = reward if config.model.critic == "reward" and has_reward else policy
            # Its gradients do not live at the same time as the policy's: the larger ones count.
            out["critic"] = (FP32 + ADAM) * body.backbone / ranks
            out["gradients"] = FP32 * max(policy.parameters, body.backbone) / ranks
        compute = 2 if config.model.dtype == "bfloat16" else 4
        vllm = config.rollout.engine == "vllm"
        if ranks > 1 or vllm:  # sampling wants the weights in one piece
            out["policy for sampling"] = compute * policy.parameters
        out["generation cache"] = _cache(config, policy)
        if vllm:  # what it takes besides is up to rollout.gpu_memory
            for name in ("policy for sampling", "generation cache"):
                out[name] /= config.rollout.tensor_parallel
    batch = {
        "sft": config.sft.batch,
        "rm": 2 * config.rm.batch,
        "metarm": max(2 * config.rm.batch, config.metarm.meta_batch * config.metarm.samples),
        "ppo": config.ppo.sequences_per_step,
    }
    answer = (
        config.data.max_answer_tokens if stage != "ppo" else 0
    ) or config.rollout.max_new_tokens
    tokens = batch[stage] // ranks * (config.data.max_prompt_tokens + answer)
    out["activations"] = _activations(config, shape, tokens)
    return {name: int(value) for name, value in out.items()}


def _activations(config: Config, shape: Shape, tokens: int) -> int:
    """What the backward pass of a micro-batch of at most `tokens` keeps. In bfloat16 the residual
    stream and the norms stay float32, as the master weights are: 4 bytes; what goes into matrix
    products: 2."""
    compute = 2 if config.model.dtype == "bfloat16" else 4
    residual = 4 * 4 * shape.hidden  # in and out of two norms
    products = compute * (
        2 * shape.hidden  # into q, k, v and into gate, up
        + 3 * shape.query  # q, q rotated, out of attention
        + 3 * shape.key_value  # k, k rotated, v
        + 4 * shape.intermediate  # gate, its activation, up, their product
    )
    layer = residual + products
    kept = 4 * shape.hidden * shape.layers + layer  # a layer's input; one layer recomputed
    if not config.model.gradient_checkpointing:
        kept = layer * shape.layers
    return min(config.trainer.tokens_per_microbatch, tokens) * kept


def _cache(config: Config, shape: Shape) -> int:
    compute = 2 if config.model.dtype == "bfloat16" else 4
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    cache = 2 * shape.layers * shape.key_value * compute * tokens
    return config.rollout.batch * (cache + 4 * shape.vocabulary)  # and one step's logits


# The plan in words.


def _ranks(config: Config) -> int:
    return config.run.ranks or int(os.environ.get("WORLD_SIZE", "1"))


def describe(config: Config, stages: Sequence[str], found: Checked) -> str:
    ranks = _ranks(config)
    on = f"{ranks} rank{'s' if ranks > 1 else ''}"
    lines = [f"plan: {', '.join(stages)} on {on}, into {config.run.output}"]
    policy, reward = found.policy, found.reward or found.policy
    if policy:
        lines.append(
            f"policy: {policy.source}, {_millions(policy.parameters)} parameters "
            f"({policy.layers} layers, {policy.hidden} wide, vocabulary {policy.vocabulary})"
        )
    lines += ["", "stages"]
    lines += [f"  {stage:<6} {_stage(config, stage)}" for stage in stages]
    for name, overrides in config.baselines.items() if "ppo" in stages else ():
        lines.append(f"  ppo    once more as baseline {name}: {' '.join(overrides)}")
    if found.rows:
        lines += ["", "data"]
        lines += [
            f"  {key:<15} {_named(config, key)}: {count}" for key, count in found.rows.items()
        ]
    trained = [stage for stage in stages if stage in ("sft", "rm", "ppo", "metarm")]
    if policy and reward and trained:
        lines += ["", *_memory_table(config, trained, policy, reward, ranks)]
    if found.notes:
        lines += ["", "not checked here"]
        lines += [f"  {note}" for note in found.notes]
    return "\n".join(lines)


def _stage(config: Config, stage: str) -> str:
    if stage == "sft":
        sft = config.sft
        return f"{sft.steps} steps of {sft.batch} demonstrations, lr {sft.lr:g}"
    if stage == "rm":
        rm = config.rm
        terms = "".join(
            f", {name} {getattr(rm, name):g}"
            for name in ("label_smoothing", "centring", "rating")
            if getattr(rm, name)
        )
        return f"{rm.steps} steps of {rm.batch} pairs, lr {rm.lr:g}, head {rm.head}{terms}"
    if stage == "metarm":
        meta = config.metarm
        return (
            f"{meta.rounds} rounds: {meta.meta_prompts} prompts ({meta.prompts}) x {meta.samples} "
            f"answers, {meta.steps} steps of {config.rm.batch} pairs, variant {meta.variant}, "
            f"lr {meta.lr:g}, then {meta.ppo_steps or config.ppo.steps} steps of PPO"
        )
    if stage == "eval":
        return "answers to the evaluation prompts, scored"
    ppo, groups = config.ppo, config.groups
    tokens = ppo.steps * ppo.sequences_per_step * config.rollout.max_new_tokens
    how = (
        f"groups {groups.inference} (M = {groups.num_groups}, focus {groups.focus:g}, beta "
        f"{groups.beta:g}, performance {groups.performance})"
        if groups.active
        else "no groups"
    )
    kl = f"KL {config.kl.coef:g}{' adaptive' if config.kl.adaptive and groups.active else ''}"
    return (
        f"{ppo.steps} steps of {ppo.prompts_per_step} prompts x {ppo.samples_per_prompt} answers, "
        f"{ppo.ppo_epochs} epochs x {ppo.minibatches} minibatches, up to {_millions(tokens)} "
        f"answer tokens, lr {ppo.lr:g} / {ppo.critic_lr:g}, {ppo.advantages}, {how}, {kl}"
    )


def _memory_table(config: Config, stages, policy: Shape, reward: Shape, ranks: int) -> list[str]:
    columns = {stage: memory(config, stage, policy, reward, ranks) for stage in stages}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [f"{'memory of each rank, estimated':<32}" + "".join(f"{s:>12}" for s in stages)]
    for name in names:
        cells = [_bytes(columns[s][name]) if name in columns[s] else "" for s in stages]
        lines.append(f"  {name:<30}" + "".join(f"{cell:>12}" for cell in cells))
    totals = "".join(f"{_bytes(sum(columns[s].values())):>12}" for s in stages)
    return [*lines, f"  {'sum':<30}{totals}"]


def _named(config: Config, key: str) -> str:
    sources = config.data.sources(key)
    if len(sources) == 1:
        return sources[0].source
    return ", ".join(f"{each.source} (weight {each.weight:g})" for each in sources)


def _count(rows: Sequence[Any]) -> str:
    """How many rows, and their tokens."""

    def tokens(row) -> int:
        if isinstance(row, tuple):
            return len(row[0]) + len(row[1])
        if hasattr(row, "ids"):
            return len(row.ids)
        return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))

    counts = [tokens(row) for row in rows]
    return f"{len(rows)} rows, {sum(counts) / len(counts):.0f} tokens each, at most {max(counts)}"


def _millions(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
