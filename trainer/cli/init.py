"""`gi init --model M --data D [--gpus N] [--memory GIB] [--output FILE] [section.key=value ...]`: a
commented config.yaml that fits.

What can be found out is not asked: what the rows are (pairs, demonstrations, prompts with answers),
how long they are, how many GPUs there are and how large, whether vLLM is there. Settings are tried
from the most comfortable ones on, until the plan's own estimate (`memory`) fits.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import config as settings
from trainer.cli import hub
from trainer.cli.data import Found, look
from trainer.cli.memory import PUBLISHED, Shape, plan, published, shape_of
from trainer.config import Config, ConfigError
from trainer.data.errors import first_line
from trainer.runs import files

GIB = 2**30
ON_TOP, ROOM = 3 * GIB, 0.95
"""CUDA's and NCCL's own memory beside torch's, 2 to 4 GB, and the part of the rest that is planned
with: the allocator needs some, and the plan is an estimate."""


@dataclass(frozen=True)
class Machine:
    gpus: int
    """0: a CPU."""
    memory: int
    """Bytes of each GPU, or of the machine."""
    name: str

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)

    @property
    def usable(self) -> int:
        return int((self.memory - (ON_TOP if self.gpus else 0)) * ROOM)


def machine(gpus: int | None, gib: float | None) -> Machine:
    """This one, or the one that is asked for."""
    settings.require(gpus is None or gpus >= 0, "--gpus", gpus, "0 (a CPU) or more")
    settings.require(gib is None or gib > 0, "--memory", gib, "GiB of each GPU")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = there if gpus is None else gpus
    if gib is not None:
        return Machine(gpus, int(gib * GIB), f"{gib:g} GiB, as asked for")
    if gpus == 0:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(0, whole, f"this machine's {whole / GIB:.0f} GiB")
    if there == 0:
        raise ConfigError("says how many GiB each of those GPUs has; there is none here to ask",
                          "--memory")  # fmt: skip
    all_of_them = [torch.cuda.get_device_properties(i) for i in range(there)]
    least = min(all_of_them, key=lambda each: each.total_memory)
    return Machine(gpus, least.total_memory, f"{least.name}, {least.total_memory / GIB:.0f} GiB")


def shape(source: str) -> Shape:
    """From the model's own configuration, or, without a network, of a model that is known."""
    if hub.is_name(source) and not hub.reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return shape_of(transformers.AutoConfig.from_pretrained(source), source)
    except Exception as error:  # the hub, the network, a broken file
        if source in PUBLISHED:
            return published(source)
        raise ConfigError(f"cannot be resolved: {first_line(error)}", "--model", source) from None


# --- what fits ------------------------------------------------------------------------------------

Settings = dict[str, object]
"""section.key -> value."""


ADAPTERS: Settings = {
    "lora.rank": 32,
    "lora.alpha": 64.0,
    "sft.lr": 1e-4,
    "rm.lr": 1e-4,
    "ppo.lr": 2e-5,
    "ppo.critic_lr": 1e-4,
}
"""Ten times the learning rates of all weights, and more."""


def ladder(gpus: int) -> list[Settings]:
    """The most comfortable first. What is further down costs time; below all weights in 32 bits it
    is another run: moments of 8 bits, then adapters, then adapters on a base of 4 bits."""
    sizes = (16384, 8192, 4096, 2048)
    plain: list[Settings] = [{"trainer.tokens_per_microbatch": size} for size in sizes[:3]]
    recomputed: list[Settings] = [
        {"model.gradient_checkpointing": True, "trainer.tokens_per_microbatch": size}
        for size in sizes
    ]
    small: Settings = {**recomputed[-1], "rollout.batch": 16}
    if not gpus:
        return [*plain, *recomputed, small]
    away: Settings = {**small, "model.offload_reference": True}
    lean: Settings = {**away, "trainer.optimizer": "adamw8bit"}
    adapters = [{**step, **ADAPTERS} for step in (*recomputed[1:], small)]
    four_bits: Settings = {"lora.quantize": "nf4", "rollout.engine": "hf"}
    quantised = [{**step, **four_bits} for step in adapters[1:]]
    return [*plain, *recomputed, small, away, lean, *adapters, *quantised]


def fitting(
    base: Settings, overrides: Sequence[str], there: Machine, policy: Shape
) -> tuple[Config, Settings, int]:
    """The first step of the ladder whose plan fits, and the most that any stage of it takes."""
    least = None
    for step in ladder(there.gpus):
        chosen = {**base, **step}
        config = configured(chosen, overrides)
        card = there.memory if there.gpus else None
        stages = [stage for stage in config.run.stages if stage != "metarm"]
        most = plan(config, stages, policy, ranks=there.ranks, card=card).needed
        if most <= there.usable:
            return config, chosen, most
        least = most if least is None else min(least, most)
    wants, whole, usable = (each / GIB for each in (least or 0, there.memory, there.usable))
    raise ConfigError(
        f"does not fit: of the settings that were tried the smallest wants {wants:.1f} GiB on each "
        f"of {there.ranks}, and of {whole:.0f} GiB {usable:.1f} can be planned with; take more "
        "GPUs (--gpus) or a smaller model",
        "--model",
        policy.source,
    )


def configured(chosen: Settings, overrides: Sequence[str]) -> Config:
    said = [f"{key}={settings.as_yaml(value)}" for key, value in chosen.items()]
    return settings.resolve({}, {}, [*said, *overrides], "runs/config")


# --- the file -------------------------------------------------------------------------------------


def write(
    model: str,
    data: str,
    gpus: int | None,
    gib: float | None,
    output: str,
    overrides: Sequence[str],
) -> int:
    path = Path(output or "config.yaml")
    if path.exists():
        raise ConfigError("is there already; choose another --output", where=str(path))
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"is {path.name}; want a name that ends in .yaml", "--output")
    there, policy, found = machine(gpus, gib), shape(model), look(data, model)
    base = {
        "run.ranks": there.ranks,
        **({"run.memory": round(there.memory / GIB, 1)} if there.gpus else {}),
        "model.policy": model,
        "model.dtype": "bfloat16" if there.gpus else "float32",
        **found.settings(given=overrides),
        **_engine(there),
    }
    config, chosen, most = fitting(base, overrides, there, policy)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text(chosen, overrides, there, policy, found, most))
    settings.load(str(path))  # as everybody will
    print(f"{path}: {policy.source}, {policy.parameters / 1e6:,.0f}M parameters; {found.said}")
    print(
        f"stages {', '.join(config.run.stages)} on {there.ranks} x {there.name}; at most "
        f"{most / GIB:.1f} GiB on each, estimated"
    )
    run = f"torchrun --nproc-per-node {there.gpus} -m trainer" if there.gpus > 1 else "gi"
    name = shlex.quote(str(path))
    print(f"look at the plan:  gi train {name} --dry-run")
    print(f"then:              {run} train {name}")
    return 0


def _engine(there: Machine) -> Settings:
    with_vllm = there.gpus > 0 and importlib.util.find_spec("vllm") is not None
    return {"rollout.engine": "vllm" if with_vllm else "hf"}


WHY = {
    "data.demonstrations": "what the policy first learns to answer like",
    "run.stages": "sft: from demonstrations; rm: the reward model, from pairs; ppo",
    "run.ranks": "what --dry-run plans for",
    "run.memory": "GiB of each GPU, for the plan",
    "model.dtype": "of compute; trained weights are kept in float32",
    "model.critic": "there is no reward model that it could start from",
    "model.gradient_checkpointing": "less memory, about a third more time",
    "model.offload_reference": "the reference policy stays in the CPU's memory",
    "data.max_prompt_tokens": "all but the longest hundredth of what was looked at, in 64s",
    "data.too_long": "or error, which names them, or truncate_left",
    "data.eval_prompts": "better: prompts that training never has",
    "data.ood_prompts": "prompts unlike those of training; none",
    "reward.model_weight": "no reward model: the functions say what an answer is worth",
    "reward.functions": "right or wrong, against column answer",
    "lora.rank": "adapters: all weights do not fit",
    "lora.quantize": "the base in 4 bits (pip install bitsandbytes)",
    "sft.lr": "adapters want ten times the rate of all weights, and more",
    "trainer.optimizer": "its moments in 8 bits",
    "rollout.engine": "hf samples with the trainer's own model; vllm is quicker",
    "rollout.batch": "answers sampled together",
    "rollout.max_new_tokens": "longer answers are cut",
    "trainer.tokens_per_microbatch": "memory and speed, never the result",
}
"""What a line of the file is for; the rest is in `gi keys`."""


def text(
    chosen: Settings, overrides: Sequence[str], there: Machine, policy: Shape, found: Found,
    most: int,
) -> str:  # fmt: skip
    """Sections in the order of the schema, a reason behind a line."""
    import yaml

    values = dict(chosen)
    reasons = WHY if found.held_out == found.source else {**WHY, "data.eval_prompts": "held out"}
    for each in overrides:
        key, _, value = each.partition("=")
        values[key] = yaml.safe_load(value)
    lines = [
        f"# {policy.source}: {policy.parameters / 1e6:,.0f}M parameters, {policy.layers} layers.",
        f"# {found.said}.",
        f"# Made for {there.ranks} x {there.name}: at most {most / GIB:.1f} GiB each, estimated.",
        "# Every other setting keeps its default: gi keys. The plan: gi train THIS --dry-run",
    ]
    for section in settings.fields_of(Config):
        mine = [key for key in values if key.startswith(f"{section.name}.")]
        if mine:
            lines += ["", f"{section.name}:"]
        for key in mine:
            why = reasons.get(key, "") if key in chosen and chosen[key] == values[key] else ""
            said = f"  {key.partition('.')[2]}: {settings.as_yaml(values[key])}"
            lines.append(f"{said:<44}  # {why}" if why else said)
    return "\n".join(lines) + "\n"
