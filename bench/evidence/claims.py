"""Claim -> what we see. The words of a verdict follow from the interval, by rule.

above        holds: the interval of the difference lies above 0
below        the same, below 0
not below    holds: the interval lies above -MARGIN
the opposite the interval lies wholly on the other side of 0
no difference  none of these, and the interval lies within +-MARGIN (figures on gold's scale)
undecided    none of these: more seeds would tell, and about how many it would take at this effect
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.evidence.measure import MARGIN, MEASURES, Runs
from bench.evidence.stats import LEVEL, Interval, t_quantile

HOLDS, OPPOSITE, SAME, UNDECIDED, NO_DATA = (
    "holds",
    "does not hold: the opposite",
    "no difference",
    "undecided",
    "not run",
)
ONE_SEED = "one seed: no interval"


@dataclass(frozen=True)
class Claim:
    text: str
    source: str
    """paper, reviewers (of the paper), ours."""
    want: str
    """above, below, not below."""
    figure: str
    """Which measure, in a word or two."""
    arms: tuple[str, ...]
    """Ours, and the one it is compared with."""
    how: str
    """Compared in which way."""
    look: Callable[[Runs], Interval | None]
    gold: bool = True
    """The figure is on gold's scale, where MARGIN has a meaning."""

    @property
    def compared(self) -> str:
        return self.how.format(*self.arms)


@dataclass(frozen=True)
class Seen:
    claim: Claim
    interval: Interval | None
    verdict: str


def verdict(want: str, seen: Interval | None, gold: bool) -> str:
    if seen is None:
        return NO_DATA
    if math.isnan(seen.low):
        return ONE_SEED
    low, high = (-seen.high, -seen.low) if want == "below" else (seen.low, seen.high)
    if low > (-MARGIN if want == "not below" else 0):
        return HOLDS
    if high < 0:
        return OPPOSITE
    if gold and low > -MARGIN and high < MARGIN:
        return SAME
    return UNDECIDED


def seeds_needed(seen: Interval, most: int = 1000) -> int | None:
    """So many seeds that scatter as these do would have an interval on one side of 0, if the mean
    that is seen is right; None: more than `most`."""
    spread = seen.half * math.sqrt(seen.n) / t_quantile((1 + LEVEL) / 2, seen.n - 1)
    return next(
        (
            n
            for n in range(seen.n, most + 1)
            if t_quantile((1 + LEVEL) / 2, n - 1) * spread < abs(seen.mean) * math.sqrt(n)
        ),
        None,
    )


def table(runs: Runs) -> list[Seen]:
    rows = []
    for claim in CLAIMS:
        seen = claim.look(runs)
        rows.append(Seen(claim, seen, verdict(claim.want, seen, claim.gold)))
    return rows


def _pair(text: str, source: str, want: str, ours: str, theirs: str, measure: str) -> Claim:
    return Claim(
        text,
        source,
        want,
        MEASURES[measure].short,
        (ours, theirs),
        "{0} less {1}",
        lambda runs: runs.paired(ours, theirs, measure),
        MEASURES[measure].gold,
    )


def _both(text: str, source: str, want: str, ours: str, theirs: str) -> list[Claim]:
    """In the worst domain and on average, over the run: the steadier figures."""
    return [
        _pair(text, source, want, ours, theirs, measure) for measure in ("worst_run", "gold_run")
    ]


def _best(text: str, measure: str, hindsight: bool) -> Claim:
    how = "best on these very seeds" if hindsight else "best on the other seeds"
    return Claim(
        text,
        "ours",
        "not below",
        MEASURES[measure].short,
        ("default",),
        "{0} less PPO at the coefficient that is " + how,
        lambda runs: runs.against_best("default", measure, hindsight)[0],
    )


def _own(text: str, source: str, want: str, arm: str, measure: str, how: str) -> Claim:
    """A figure of one arm that is a difference by itself, or should be above 0."""
    figure = MEASURES[measure.rpartition(":")[2]]
    gold = ":" in measure and figure.gold
    return Claim(
        text, source, want, figure.short, (arm,), how, lambda runs: runs.own(arm, measure), gold
    )


def _curve(text: str, source: str, want: str, arm: str, x: str, *measures: str) -> list[Claim]:
    """Against PPO's curve, at the arm's own mean coefficient (x = coef) or KL (x = kl)."""
    where = {"coef": "mean coefficient", "kl": "KL"}[x]
    how = "{0} less PPO's curve at its own " + where
    return [_own(text, source, want, arm, f"{x}:{measure}", how) for measure in measures]


def _wins(text: str, source: str, ours: str, theirs: str) -> Claim:
    def look(runs: Runs) -> Interval | None:
        seen = runs.win_rate(ours, theirs)
        if seen is None:
            return None
        ends = (seen.low - 0.5, seen.high - 0.5)
        if seen.seeds == 1:  # prompts are resampled, but one seed speaks for no other
            ends = (math.nan, math.nan)
        return Interval(seen.rate - 0.5, *ends, ends, seen.seeds)

    how = "{0} against {1}, bootstrap"
    return Claim(text, source, "above", "win rate less 1/2", (ours, theirs), how, look, gold=False)


EQUAL, SOFT_EQUAL = "ppo_equal", "soft_ppo_equal"

METHOD: tuple[Claim, ...] = (
    *(
        _pair("Better in the worst domain than PPO at equal mean KL coefficient", "ours", "above",
              "default", EQUAL, measure)
        for measure in ("worst_run", "worst_final", "hardest_run", "hardest_final")
    ),
    *(
        _pair("At no cost on average", "ours", "not below", "default", EQUAL, measure)
        for measure in ("gold_run", "gold_final", "share_run", "share_final")
    ),
    *(
        _best(f"Not below PPO at its best coefficient{how}", measure, hindsight)
        for hindsight, how in ((True, " in hindsight"), (False, ", chosen on other seeds"))
        for measure in ("worst_run", "worst_final", "gold_run", "gold_final")
    ),
    _wins("Its answers win against PPO's", "paper", "default", EQUAL),
    _wins("Its answers win against the SFT model's", "paper", "default", "sft"),
    _pair("Better than PPO out of distribution", "paper", "above", "default", EQUAL, "ood_final"),
    *_curve("More reward at equal KL than PPO", "paper", "above", "default", "kl", "proxy_final"),
    *_curve("More gold at equal KL than PPO", "ours", "above", "default", "kl", "worst_final",
            "gold_final"),
    _pair("A smaller gap between the groups than PPO", "paper", "below", "default", EQUAL,
          "group_gap"),
    _pair("A smaller gap between the domains than PPO", "ours", "below", "default", EQUAL,
          "gap_final"),
    *(
        _pair("The easiest domain loses no more than under PPO", "ours", "not below", "default",
              EQUAL, measure)
        for measure in ("easiest_run", "easiest_final")
    ),
    _pair("A steadier training curve than PPO", "paper", "below", "default", EQUAL, "noise"),
    _pair("Less over-optimisation than PPO", "paper", "below", "default", EQUAL, "drift"),
    *_both("Weights by the variance on top are better", "ours", "above", "plus_weights",
           "default"),
    *_both("Better than without drawing", "ours", "above", "default", "no_drawing"),
    *_both("Better than without adaptive KL", "paper", "above", "default", "one_coef"),
    *_both("Drawing alone is better than PPO at the same coefficient", "ours", "above",
           "one_coef", "ppo_0.45"),
)  # fmt: skip

PAPER: tuple[Claim, ...] = (
    *_both("Weights and adaptive KL: better than PPO at their mean coefficient", "paper", "above",
           "soft", SOFT_EQUAL),
    *_both("... than without the variance term", "paper", "above", "soft", "soft_no_weights"),
    *_both("... than without adaptive KL, at equal mean", "paper", "above", "soft",
           "soft_fixed_kl"),
    _wins("... their answers win against PPO's", "paper", "soft", SOFT_EQUAL),
    _pair("... better than PPO out of distribution", "paper", "above", "soft", SOFT_EQUAL,
          "ood_final"),
    *_curve("... more reward at equal KL than PPO", "paper", "above", "soft", "kl", "proxy_final"),
    _pair("... a smaller gap between the groups", "paper", "below", "soft", SOFT_EQUAL,
          "group_gap"),
    _pair("... a steadier training curve", "paper", "below", "soft", SOFT_EQUAL, "noise"),
    _pair("... less over-optimisation", "paper", "below", "soft", SOFT_EQUAL, "drift"),
    *_curve("The paper's own recipe: better than PPO at its mean coefficient", "paper", "above",
            "paper", "coef", "worst_run", "gold_run"),
    *_both("Exact inference is better than the paper's recipe", "ours", "above", "soft", "paper"),
    *_both("The default is better than that", "ours", "above", "default", "soft"),
    *_both("Drawing alone is better than weights alone, same groups", "ours", "above", "one_coef",
           "weights"),
)  # fmt: skip

GROUPS: tuple[Claim, ...] = (
    _own("The groups agree with the true domains more than chance", "reviewers", "above",
         "default", "ami", "{0}: group and domain"),
    _own("The groups tell difficulty", "reviewers", "above", "default", "difficulty",
         "{0}: group and the SFT model's gold on the prompt"),
    *_both("Inferred groups are better than random ones", "reviewers", "above", "default",
           "random"),
    *_both("No worse than with the true domains", "reviewers", "not below", "default", "oracle"),
    *_both("Exact inference is better than adversarial", "ours", "above", "default", "adversarial"),
    *_both("Hard groups are better than soft ones", "ours", "above", "default", "soft_draws"),
    *(
        claim
        for m in (2, 3, 8)
        for claim in _both(f"Four groups are no worse than {m}", "reviewers", "not below",
                           "default", f"m{m}")
    ),
    *_both("Drawing fully is no worse than by half", "ours", "not below", "default", "focus_0.5"),
    *_both("A kept pool is no worse than a new one at every step", "ours", "not below",
           "kept_pool", "default"),
    *_both("Graded KL is better than whole for the easiest group alone", "ours", "above",
           "default", "easiest"),
    _pair("... and keeps more of the easiest domain", "ours", "above", "default", "easiest",
          "easiest_run"),
    *(
        claim
        for name, title in (
            ("variance", "the paper's objective"),
            ("gdro", "Group-DRO's adversary"),
            ("progress", "least progress"),
            ("bandit", "a bandit on advantages"),
            ("signal", "the spread of returns"),
        )
        for claim in _both(f"Drawing evenly is no worse than by {title}", "reviewers",
                           "not below", "default", name)
    ),
    *(
        claim
        for name, title in (
            ("group_dro", "Group-DRO"),
            ("cvar", "CVaR"),
            ("sequence_variance", "variance without groups"),
        )
        for claim in _both(f"Drawing alone is better than {title}", "reviewers", "above",
                           "one_coef", name)
    ),
    *_both("For weights, form mass is better than uniform", "ours", "above", "weights", "uniform"),
    *_both("For weights, form mass is better than one-sided", "ours", "above", "weights",
           "one_sided"),
    *_both("The head reads the prompt better than the response", "ours", "above", "soft",
           "on_response"),
    *_both("Ratings are better groups than answers of the reference", "ours", "above", "default",
           "over_reference"),
    *_both("With pairs alone: over reference is better than raw", "ours", "above",
           "unrated/default", "unrated/raw"),
    *_both("With pairs alone: better than without adaptive KL", "ours", "above",
           "unrated/default", "unrated/one_coef"),
)  # fmt: skip

ELSEWHERE: tuple[Claim, ...] = (
    *(
        claim
        for world in ("unrated", "costly", "harmless", "thin")
        for claim in _both(f"World {world}: better than PPO at equal mean coefficient", "ours",
                           "above", f"{world}/default", f"{world}/ppo_equal")
    ),
    *(
        claim
        for world in ("costly", "harmless", "thin")
        for claim in _curve(f"World {world}: weights and adaptive KL are no worse than PPO",
                            "ours", "not below", f"{world}/soft", "coef", "worst_run", "gold_run")
    ),
    *(
        claim
        for name, what in (("outliers", "outliers in the reward"), ("noisy", "a noisy reward"))
        for claim in _both(f"Under {what}: better than PPO at equal mean coefficient",
                           "reviewers", "above", f"{name}/default", f"{name}/ppo_equal")
    ),
    *(
        claim
        for name, what in (
            ("groups_10", "10 % of sequences in a wrong group"),
            ("groups_30", "30 % of sequences in a wrong group"),
            ("labels_10", "10 % of the head's labels wrong"),
            ("labels_30", "30 % of the head's labels wrong"),
        )
        for claim in _both(f"With {what}: no worse", "reviewers", "not below", name, "default")
    ),
)  # fmt: skip

CLAIMS = (*METHOD, *PAPER, *GROUPS, *ELSEWHERE)
