"""Which runs the study has.

An arm is a PPO run: the packaged configuration `toy` with a few overrides, on the SFT and reward
model that all arms of one world and seed share. Where an arm says `coef_from`, its KL coefficient
is the mean that another arm used in the same seed: adaptive KL lowers the mean, and a comparison at
equal nominal coefficients would flatter it. Sections are the tables of the report; an
arm may stand in several and runs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.evidence.worlds import WORLDS

TUNING_SEEDS = range(100, 110)
"""Defaults were chosen on these, so they are no evidence; nor is 0, the demonstration's."""


@dataclass(frozen=True)
class Arm:
    name: str
    title: str
    overrides: tuple[str, ...] = ()
    world: str = "toy"
    coef_from: str = ""
    """kl.coef is the mean over the run of this arm's objective/kl_coef."""
    disturb: tuple[tuple[str, float], ...] = ()
    """Disturbances that no setting gives; see disturb.py."""
    kind: str = "ppo"
    """ppo, or evaluate: the SFT model that PPO starts from, as it is."""


@dataclass(frozen=True)
class Section:
    title: str
    about: str
    arms: tuple[str, ...]
    seeds: int = 5
    control: str = "default"
    """The arm that the others are compared with, beside PPO at equal mean coefficient."""


PLAIN = ("groups.inference=none", "kl.adaptive=false")
PPO_COEFS = (0.0, 0.2, 0.3, 0.45, 0.7)
FEW_COEFS = (0.2, 0.8)
SOFT = (
    "groups.num_groups=2",
    "groups.assign=soft",
    "groups.focus=0",
    "groups.beta=1",
    "kl.coef=0.8",
    "kl.floor=0.1",
)
"""Weights and adaptive KL on two soft groups, as in the paper, but found by exact inference."""
ONE_COEF = ("kl.adaptive=false", "kl.coef=0.45")
"""What adaptive KL comes to on average in the packaged configuration."""
EASIEST = ("kl.shape=easiest", "kl.coef=0.71")
"""The same mean in the other form: the packaged one of the first edition."""
AS_THEY_COME = ("groups.focus=0", "groups.beta=1", *ONE_COEF)
"""Weights on advantages and nothing else: where an objective is to be seen by itself."""


def _reward_function(name: str) -> str:
    return f"reward.functions=[{{function: 'bench.evidence.disturb:{name}', name: {name}}}]"


def _fixed(name: str, title: str, *overrides: str, source: str = "default", **more) -> Arm:
    """An arm with one KL coefficient for all, the mean of `source`."""
    return Arm(name, title, (*overrides, "kl.adaptive=false"), coef_from=source, **more)


def _ppo(coef: float, prefix: str = "", **more) -> Arm:
    overrides = (*PLAIN, f"kl.coef={coef}")
    return Arm(f"{prefix}ppo_{coef:g}", f"PPO, KL coefficient {coef:g}", overrides, **more)


def _pair(prefix: str, what: str, overrides: tuple[str, ...] = (), **more) -> tuple[Arm, ...]:
    """The method and its control where something else is changed for both."""
    return (
        Arm(f"{prefix}/default", f"group-invariant, {what}", overrides, **more),
        _fixed(
            f"{prefix}/ppo_equal",
            f"PPO at its mean coefficient, {what}",
            *PLAIN,
            *overrides,
            source=f"{prefix}/default",
            **more,
        ),
    )


def _world(name: str) -> tuple[Arm, ...]:
    return (
        Arm(f"{name}/sft", f"SFT, {name}", world=name, kind="evaluate"),
        *_pair(name, name, world=name),
        Arm(f"{name}/soft", f"weights and adaptive KL, soft groups, {name}", SOFT, name),
        *(_ppo(coef, f"{name}/", world=name) for coef in FEW_COEFS),
    )


_MAIN = (
    Arm("sft", "SFT", kind="evaluate"),
    Arm("default", "group-invariant: prompts drawn evenly from a new pool, adaptive KL"),
    Arm(
        "easiest",
        "adaptive KL as it was: whole for the easiest group, half for the others",
        EASIEST,
    ),
    _fixed("ppo_equal", "PPO at the method's mean coefficient", *PLAIN),
    Arm("one_coef", "without adaptive KL, at 0.45, about its mean", ONE_COEF),
    Arm("no_drawing", "without drawing: adaptive KL alone", ("groups.focus=0",)),
    Arm("plus_weights", "and weights by the variance, beta 1", ("groups.beta=1",)),
    *(_ppo(coef) for coef in PPO_COEFS),
)
_PAPER = (
    Arm("soft", "weights and adaptive KL on two soft groups, exact inference", SOFT),
    Arm("soft_no_weights", "that without the variance term", (*SOFT, "groups.beta=0")),
    _fixed("soft_fixed_kl", "that without adaptive KL, at its mean", *SOFT, source="soft"),
    _fixed("soft_ppo_equal", "PPO at its mean coefficient", *PLAIN, source="soft"),
    Arm(
        "paper",
        "the paper's own: adversarial, uniform, head on the response, kappa 0",
        (
            *SOFT,
            "groups.inference=adversarial",
            "groups.form=uniform",
            "groups.on=response",
            "kl.floor=0.0",
        ),
    ),
    Arm("weights", "weights on four hard groups, prompts as they come", AS_THEY_COME),
)
_INFERENCE = (
    Arm("oracle", "oracle: the true domains", ("groups.inference=oracle",)),
    Arm("adversarial", "adversarial", ("groups.inference=adversarial",)),
    Arm("random", "random groups", ("groups.inference=random",)),
    Arm("soft_draws", "exact, soft groups", ("groups.assign=soft",)),
)
_FORMS = (
    Arm("uniform", "uniform", (*AS_THEY_COME, "groups.form=uniform")),
    Arm("one_sided", "one-sided", (*AS_THEY_COME, "groups.form=one_sided")),
)
_OBJECTIVES = {
    "group_dro": "Group-DRO",
    "cvar": "CVaR",
    "sequence_variance": "variance without groups",
}
_NEIGHBOURS = tuple(
    Arm(name, title, (*AS_THEY_COME, f"groups.objective={name}"))
    for name, title in _OBJECTIVES.items()
)
_GROUPS = tuple(Arm(f"m{m}", f"M = {m}", (f"groups.num_groups={m}",)) for m in (2, 3, 8))
_DRAWING = (
    Arm("focus_0.5", "focus 0.5", ("groups.focus=0.5",)),
    Arm(
        "kept_pool",
        "as packaged: a pool of 16, renewed in 32 steps, an eighth of the questions",
        ("groups.pool=16", "groups.refresh=32"),
    ),
)
_RULES = (
    Arm("variance", "variance: the paper's objective by drawing", ("groups.draw=variance",)),
    Arm("gdro", "gdro: Group-DRO's adversary", ("groups.draw=gdro",)),
    Arm("progress", "progress: what has gained least", ("groups.draw=progress",)),
    Arm("bandit", "bandit: by the size of advantages", ("groups.draw=bandit",)),
    Arm("signal", "signal: by the predicted spread of returns", ("groups.draw=signal",)),
)
_BETA = tuple(
    Arm(f"beta_{b:g}", f"beta = {b:g}", ("groups.focus=0", *ONE_COEF, f"groups.beta={b}"))
    for b in (0.3, 3.0)
)
_KAPPA = tuple(
    Arm(f"kappa_{k:g}", f"kappa = {k:g}", (*SOFT, f"kl.floor={k}")) for k in (0.0, 0.3, 0.6)
)
_PERFORMANCE = tuple(
    Arm(how, f"{how.replace('_', ' ')}, rated reward model", (f"groups.performance={how}",))
    for how in ("over_reference", "quantile")
)
_UNRATED = (
    Arm("unrated/sft", "SFT, unrated", world="unrated", kind="evaluate"),
    *_pair(
        "unrated",
        "over reference, pairs alone",
        ("groups.performance=over_reference",),
        world="unrated",
    ),
    _fixed(
        "unrated/one_coef",
        "over reference without adaptive KL, at its mean, pairs alone",
        "groups.performance=over_reference",
        source="unrated/default",
        world="unrated",
    ),
    *(
        Arm(f"unrated/{how}", f"{how}, pairs alone", (f"groups.performance={how}",), "unrated")
        for how in ("raw", "quantile")
    ),
)
_HEAD = (
    Arm("on_response", "weights and adaptive KL, head on the response",
        (*SOFT, "groups.on=response")),
)  # fmt: skip
_ROBUSTNESS = (
    *_pair("noisy", "a noisy reward model", (_reward_function("noise"),)),
    *_pair("outliers", "1 reward in 20 an outlier", (_reward_function("outliers"),)),
    Arm("groups_30", "30 % of sequences in a wrong group", disturb=(("wrong_group", 0.3),)),
    Arm("labels_30", "30 % of the head's labels flipped", disturb=(("wrong_label", 0.3),)),
    Arm("groups_10", "10 % of sequences in a wrong group", disturb=(("wrong_group", 0.1),)),
    Arm("labels_10", "10 % of the head's labels flipped", disturb=(("wrong_label", 0.1),)),
)
_WORLDS = {name: _world(name) for name in ("costly", "harmless", "thin")}


def _reasoning(name: str, title: str, *overrides: str) -> Arm:
    return Arm(f"reasoning/{name}", title, overrides, "reasoning")


def _equally(name: str, title: str, *overrides: str, source: str = "default") -> Arm:
    """At the mean coefficient of another arm."""
    of = f"reasoning/{source}"
    return _fixed(f"reasoning/{name}", title, *overrides, source=of, world="reasoning")


_GRPO = (
    "ppo.advantages=group_norm",
    "ppo.samples_per_prompt=8",
    "ppo.prompts_per_step=16",
    "ppo.kl_in_loss=true",
    "kl.estimator=k3",
)
"""As many answers a step as PPO, eight to a prompt."""
_REASONING_MAIN = (
    Arm("reasoning/sft", "the SFT model", world="reasoning", kind="evaluate"),
    _reasoning("default", "group-invariant PPO"),
    _equally("ppo_equal", "PPO at its mean coefficient", *PLAIN),
    _equally("drawing", "drawing alone, at its mean coefficient"),
    _reasoning("gi_grpo", "group-invariant GRPO", *_GRPO),
    _equally("grpo", "GRPO at its mean coefficient", *PLAIN, *_GRPO, source="gi_grpo"),
    _reasoning("oracle", "groups: the true families", "groups.inference=oracle"),
    _reasoning("random", "groups at random", "groups.inference=random"),
)
_WEAK = (
    Arm("weak_start/sft", "the SFT model", world="weak_start", kind="evaluate"),
    *_pair("weak_start", "as packaged", world="weak_start"),
)
_MORE = "ppo.prompts_per_step=32"
_SMOLLM = (
    Arm("smollm/sft", "the SFT model", world="smollm", kind="evaluate"),
    Arm("smollm/default", "group-invariant PPO", world="smollm"),
    Arm("smollm/ppo", "PPO, as packaged beside it", (*PLAIN, "kl.coef=0.04"), "smollm"),
    Arm("smollm/gi_grpo", "group-invariant GRPO", (*_GRPO, _MORE), "smollm"),
    Arm("smollm/grpo", "GRPO", (*PLAIN, *_GRPO, _MORE, "kl.coef=0.04"), "smollm"),
)
_REASONING_RULES = tuple(
    _reasoning(rule, f"draws by the rule {rule}", f"groups.draw={rule}")
    for rule in ("variance", "gdro", "progress", "bandit", "signal")
)

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        *_MAIN,
        *_PAPER,
        *_INFERENCE,
        *_FORMS,
        *_NEIGHBOURS,
        *_GROUPS,
        *_DRAWING,
        *_RULES,
        *_BETA,
        *_KAPPA,
        *_PERFORMANCE,
        *_UNRATED,
        *_HEAD,
        *(arm for arms in _WORLDS.values() for arm in arms),
        *_ROBUSTNESS,
        *_REASONING_MAIN,
        *_REASONING_RULES,
        *_WEAK,
        *_SMOLLM,
    )
}


def _names(arms: Iterable[Arm], *before: str) -> tuple[str, ...]:
    return (*before, *(arm.name for arm in arms))


SECTIONS: dict[str, Section] = {
    "main": Section(
        "The method, its parts and PPO",
        "One budget, one SFT and reward model a seed.",
        _names(_MAIN),
        seeds=8,
    ),
    "paper": Section(
        "The paper's parts: weights and adaptive KL",
        "Prompts as they come. PPO at equal mean coefficient is the control.",
        _names(_PAPER, "default"),
        control="soft",
    ),
    "inference": Section(
        "How groups are found",
        "Default: exact, hard. Random groups are drawn evenly, too: that is PPO.",
        _names(_INFERENCE, "default", "ppo_equal"),
    ),
    "neighbours": Section(
        "Neighbouring objectives",
        "Weights on advantages and nothing else, at one KL coefficient of 0.45: PPO's is ppo_0.45.",
        _names(_NEIGHBOURS, "weights", "ppo_0.45", "default"),
        control="ppo_0.45",
    ),
    "groups": Section("Number of groups", "Default: M = 4.", _names(_GROUPS, "default")),
    "drawing": Section(
        "How prompts are drawn",
        "Default: focus 1, a new pool of 4 at every step; packaged is a pool that is kept.",
        _names(_DRAWING, "default"),
    ),
    "rules": Section(
        "By which rule prompts are drawn",
        "Default: even. Adaptive KL with all; every rule samples as many answers.",
        _names(_RULES, "default", "no_drawing", "ppo_equal"),
        seeds=8,
    ),
    "forms": Section(
        "Form of the variance",
        "Weights on four hard groups, prompts as they come: form mass.",
        _names(_FORMS, "weights"),
        control="weights",
    ),
    "beta": Section(
        "Weight of the variance",
        "Four hard groups, prompts as they come: beta = 1.",
        _names(_BETA, "weights"),
        control="weights",
    ),
    "kappa": Section(
        "Floor of the KL coefficient",
        "Two soft groups: kappa = 0.1. The mean coefficient rises with kappa.",
        _names(_KAPPA, "soft"),
        control="soft",
    ),
    "performance": Section(
        "What is compared between prompts",
        "Default: the score, of a reward model trained on ratings as well.",
        _names(_PERFORMANCE, "default"),
    ),
    "unrated": Section(
        "The same with pairs alone",
        WORLDS["unrated"].about + ".",
        _names(_UNRATED),
        control="unrated/default",
    ),
    "head": Section(
        "What the head reads", "Two soft groups: the prompt.", _names(_HEAD, "soft"), control="soft"
    ),
    **{
        name: Section(
            f"World: {name}", f"{WORLDS[name].about}.", _names(arms), control=f"{name}/default"
        )
        for name, arms in _WORLDS.items()
    },
    "robustness": Section(
        "Robustness",
        "Disturbances of the reward hit PPO as well; those of the groups only the method.",
        _names(_ROBUSTNESS, "default", "ppo_equal"),
    ),
    "reasoning": Section(
        "The method, its parts, PPO and GRPO",
        "One SFT model for all. Every arm answers as many prompts as often; gold: the answer is "
        "right (pass@1).",
        _names(_REASONING_MAIN),
        control="reasoning/default",
    ),
    "reasoning_rules": Section(
        "By which rule prompts are drawn",
        "Default: even.",
        _names(_REASONING_RULES, "reasoning/default", "reasoning/ppo_equal"),
        control="reasoning/default",
    ),
    "weak_start": Section(
        "From a weaker start model",
        "The problems of `reasoning`; one SFT model for all, that of seed 0.",
        _names(_WEAK),
        control="weak_start/default",
    ),
    "smollm": Section(
        "A pretrained model",
        "One SFT model for all, as many answers a step. On one GPU.",
        _names(_SMOLLM),
        seeds=1,
        control="smollm/default",
    ),
}


def sections_of(world: str) -> list[str]:
    """Of one study, in order."""
    elsewhere = {name for names in STUDIES.values() for name in names}
    return [*STUDIES[world]] if world in STUDIES else [s for s in SECTIONS if s not in elsewhere]


STUDIES = {
    "reasoning": ("reasoning", "reasoning_rules"),
    "weak_start": ("weak_start",),
    "smollm": ("smollm",),
}
"""Sections with a page of their own; all others are the study of the toy world."""


def controls(section: Section, arms: Sequence[str]) -> list[str]:
    """What the arms of a section are compared with, of those that are there."""
    equal = section.control.replace("default", "ppo_equal")
    world = section.control.partition("/")[0]
    beside = (f"{world}/ppo", f"{world}/grpo", "default", "soft_ppo_equal")
    names = (section.control, equal, *beside)
    return [name for name in dict.fromkeys(names) if name in arms]
