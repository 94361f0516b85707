"""What a run will do, in words: its stages, its data, and the memory it takes."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.cli.check import Checked, named
from trainer.cli.memory import Plan, plan, planned_ranks
from trainer.config import Config


def describe(config: Config, stages: Sequence[str], found: Checked) -> str:
    ranks = planned_ranks(config)
    on = f"{ranks} rank{'s' if ranks > 1 else ''}"
    lines = [f"plan: {', '.join(stages)} on {on}, into {config.run.output}"]
    policy, reward = found.policy, found.reward or found.policy
    if policy:
        lines.append(
            f"policy: {policy.source}, {_millions(policy.parameters)} parameters "
            f"({policy.layers} layers, {policy.hidden} wide, vocabulary {policy.vocabulary})"
        )
    if config.lora.active:
        lines.append(f"adapters: {_adapters(config)}")
    lines += ["", "stages"]
    lines += [f"  {stage:<6} {_stage(config, stage)}" for stage in stages]
    for name, overrides in config.baselines.items() if "ppo" in stages else ():
        lines.append(f"  ppo    once more as baseline {name}: {' '.join(overrides)}")
    if found.rows:
        lines += ["", "data"]
        lines += [f"  {key:<15} {named(config, key)}: {count}" for key, count in found.rows.items()]
    trained = [stage for stage in stages if stage in ("sft", "rm", "ppo", "metarm")]
    if policy and reward and trained:
        lines += ["", *_memory_table(plan(config, trained, policy, reward, ranks), ranks)]
    if found.notes:
        lines += ["", "not checked here"]
        lines += [f"  {note}" for note in found.notes]
    return "\n".join(lines)


def _adapters(config: Config) -> str:
    lora = config.lora
    critic = f", the critic's {lora.critic_rank}" if lora.critic_rank else ""
    four_bits = ", its layers in 4 bits" if lora.quantize != "none" else ""
    return (
        f"rank {lora.rank}{critic}, alpha {lora.alpha:g}, on {', '.join(lora.names)}; policy, "
        f"critic and reward model stand on one frozen base{four_bits}"
    )


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
        f"groups {groups.inference} (M = {groups.num_groups}, draw {groups.draw}, beta "
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


def _memory_table(found: Plan, ranks: int) -> list[str]:
    columns, stages = found.columns, list(found.columns)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [f"{'memory of each rank, estimated':<32}" + "".join(f"{s:>12}" for s in stages)]
    for name in names:
        cells = [_bytes(columns[s][name]) if name in columns[s] else "" for s in stages]
        lines.append(f"  {name:<30}" + "".join(f"{cell:>12}" for cell in cells))
    totals = "".join(f"{_bytes(found.most[s]):>12}" for s in stages)
    lines.append(f"  {'at most at once':<30}{totals}")
    if found.card is None:
        return lines
    card = f"{ranks} x {found.card / 2**30:.0f} GiB" if ranks > 1 else _bytes(found.card)
    if found.fits:
        return [*lines, f"fits into {card}"]
    cures = (
        "lora.rank=16, model.gradient_checkpointing=true, a smaller trainer.tokens_per_microbatch, "
        "model.offload_reference=true, trainer.optimizer=adamw8bit or offload, more GPUs"
    )
    return [*lines, f"DOES NOT FIT into {card}; what takes less: {cures}"]


def _millions(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
