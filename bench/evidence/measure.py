"""The figures of one run, and of many side by side.

Gold is the judgement by program that trains nothing. The evaluation has as many prompts of each
domain, so `gold` is a plain mean over domains; `gold by share` weighs them as training does. Final
figures are means over several evaluations of the last policy, with other random numbers each;
"over the run" is the mean over the evaluations during training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.evidence import stats
from bench.evidence.matrix import ARMS, Arm
from bench.evidence.scheduler import Study, mean_coefficient
from bench.evidence.stats import Interval

Figures = dict[str, float]


@dataclass(frozen=True)
class Measure:
    title: str
    short: str
    """For the head of a column."""
    more_is_better: bool | None = None
    digits: int = 3
    gold: bool = False
    """On gold's scale, where a difference below MARGIN matters to nobody."""


MEASURES: dict[str, Measure] = {
    "worst_run": Measure("worst domain's gold, over the run", "worst, run", True, gold=True),
    "worst_final": Measure("worst domain's gold, final", "worst, final", True, gold=True),
    "hardest_run": Measure("hardest domain's gold, over the run", "hardest, run", True, gold=True),
    "hardest_final": Measure("hardest domain's gold, final", "hardest, final", True, gold=True),
    "easiest_run": Measure("easiest domain's gold, over the run", "easiest, run", True, gold=True),
    "easiest_final": Measure("easiest domain's gold, final", "easiest, final", True, gold=True),
    "gold_run": Measure("mean gold, over the run", "mean, run", True, gold=True),
    "gold_final": Measure("mean gold, final", "mean, final", True, gold=True),
    "share_run": Measure("gold by training share, over the run", "by share, run", True, gold=True),
    "share_final": Measure("gold by training share, final", "by share, final", True, gold=True),
    "ood_final": Measure("gold out of distribution, final", "out of distribution", True, gold=True),
    "gap_final": Measure("gap between domains, final", "gap", False, gold=True),
    "hard_group": Measure("gold of the hard group", "hard group, gold", True, gold=True),
    "hard_group_score": Measure("score of the hard group", "hard group, score", True),
    "group_gap": Measure("gap in gold between the groups", "gap of groups", False, gold=True),
    "own_worst_group": Measure("gold of its own worst group", "own worst group", True, gold=True),
    "proxy_final": Measure("proxy, final", "proxy", None),
    "drift": Measure("proxy minus gold, since SFT", "proxy - gold", False, gold=True),
    "gold_lost": Measure("gold lost since its best evaluation", "gold lost", False, gold=True),
    "above_guessing": Measure(
        "least above guessing of any domain, final", "above guessing", True, gold=True
    ),
    "guessing": Measure("domains no better than guessing", "guessing", False, 1),
    "generated": Measure("million tokens generated", "M tokens", None, 2),
    "kl_final": Measure("KL, final", "KL", None, 2),
    "kl_run": Measure("KL, over the run", "KL, run", None, 2),
    "coef": Measure("mean KL coefficient", "coefficient", None),
    "noise": Measure("variance of the score about its running mean", "score's variance", False, 5),
    "collapses": Measure("collapses of gold", "collapses", False, 2),
    "ami": Measure("agreement of group and domain (AMI)", "AMI", True),
    "difficulty": Measure("correlation of group and SFT gold", "corr. with SFT gold", True),
    "mass": Measure("share of the hardest group", "mass", None),
    "weight": Measure("mean weight of the hardest group", "weight", None),
    "clamped": Measure("share of clamped weights", "clamped", None),
    "seconds": Measure("seconds", "seconds", None, 0),
}
MARGIN = 0.02
"""Differences of gold below this matter to nobody; `not below` means by no more than this."""
FRONTIER = ("worst_run", "worst_final", "gold_run", "gold_final", "proxy_final")
PPO = "ppo_"


def figures(record: dict, sft: dict | None = None, grouped: dict | None = None) -> Figures:
    """Of one result. `sft`: the evaluation of the model that it started from; `grouped`: the run of
    the method whose groups are the common yardstick, for runs that have none themselves."""
    out: Figures = {}
    draws, settings = record["draws"], record["settings"]
    run = [line for line in record["evaluations"] if line.get("policy") == "policy"]
    start = next((e for e in record["evaluations"] if e.get("policy") == "sft"), None)
    start = start or draws[0]["metrics"]
    lines = run or [draw["metrics"] for draw in draws]  # the SFT model does not change
    final = [draw["metrics"] for draw in draws]

    domains = by_domain(start, "gold")
    hardest = min(domains, key=lambda name: domains[name])
    easiest = max(domains, key=lambda name: domains[name])
    world = "reasoning" if settings.get("data.prompts") == "reasoning" else "toy"
    shares = {name: settings[f"{world}.shares.{name}"] for name in domains}
    whole = sum(shares.values())
    for when, some in (("run", lines), ("final", final)):
        gold = [by_domain(line, "gold") for line in some]
        means = {name: _mean([each[name] for each in gold]) for name in domains}
        # Final: of the means, for one draw's lowest is lower than the lowest mean by chance.
        lowest = [min(each.values()) for each in gold] if when == "run" else [min(means.values())]
        out[f"worst_{when}"] = _mean(lowest)
        out[f"hardest_{when}"], out[f"easiest_{when}"] = means[hardest], means[easiest]
        out[f"gold_{when}"] = _mean([line["eval/gold"] for line in some])
        out[f"share_{when}"] = sum(shares[name] / whole * means[name] for name in domains)
        out[f"kl_{when}"] = _mean([line["eval/kl"] for line in some])
        if when == "final":
            out["gap_final"] = max(means.values()) - min(means.values())
    out["ood_final"] = _mean([line["eval/ood_gold"] for line in final])
    out["proxy_final"] = _mean([line["eval/proxy"] for line in final])
    before = start["eval/proxy"] - start["eval/gold"]
    out["drift"] = out["proxy_final"] - out["gold_final"] - before
    out["seconds"] = record["seconds"]
    guessed = (sft or record).get("guessing")
    if guessed:
        out["above_guessing"] = min(means[name] - share for name, share in guessed.items())
        out["guessing"] = sum(means[name] <= share for name, share in guessed.items())
    if "rollout/generated" in record["curves"]:
        out["generated"] = sum(record["curves"]["rollout/generated"]) / 1e6

    if run:
        curve = [line["eval/gold"] for line in record["evaluations"]]
        out["gold_lost"] = max(curve) - curve[-1]
        out["collapses"] = stats.collapses(curve)
        out["coef"] = mean_coefficient(record)
        still = settings["ppo.critic_warmup_steps"]
        scores = [each for each in record["curves"]["objective/scores"][still:] if each is not None]
        out["noise"] = stats.noise_about_running_mean(scores)

    if grouped is not None and "group" in grouped["draws"][0] and _same(record, grouped):
        group = grouped["draws"][0]["group"]
        easy = max(group)
        means = {
            name: {
                g: _mean([value for value, at in zip(draws[0][name], group) if at == g])
                for g in {min(group), easy}
            }
            for name in ("gold", "score")
        }
        if easy > min(group):
            hard = min(group)
            out["hard_group"] = means["gold"][hard]
            out["hard_group_score"] = means["score"][hard]
            out["group_gap"] = means["gold"][easy] - means["gold"][hard]
    if draws and "group" in draws[0]:
        out |= _groups(record, sft)
    return {name: value for name, value in out.items() if math.isfinite(value)}


def _groups(record: dict, sft: dict | None) -> Figures:
    """What the inferred groups mean, at the last evaluation."""
    draw = record["draws"][0]
    table = stats.contingency(draw["group"], draw["domain"])
    out = {"ami": stats.adjusted_mutual_information(table)}
    out["own_worst_group"] = record["evaluations"][-1]["eval/worst_group_gold"]
    if sft is not None and _same(record, sft):
        easy = [_mean(each) for each in zip(*(other["gold"] for other in sft["draws"]))]
        out["difficulty"] = stats.correlation(draw["group"], easy)
    names = (("group/0/mass", "mass"), ("group/0/weight", "weight"))
    for name, short in (*names, ("group/weight_clamped", "clamped")):
        curve = [each for each in record["curves"].get(name, []) if each is not None]
        if curve:
            out[short] = _mean(curve[len(curve) // 3 :])
    return out


def by_domain(line: Mapping[str, float], what: str) -> dict[str, float]:
    return {
        key.split("/")[1]: value
        for key, value in line.items()
        if key.startswith("domain/") and key.endswith(f"/{what}")
    }


def _same(a: dict, b: dict) -> bool:
    """Whether both were evaluated on the same prompts."""
    return a["draws"][0]["prompts"] == b["draws"][0]["prompts"]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


# --- many runs ----------------------------------------------------------------------------------


class Runs:
    """All results that are there, of the arms and seeds asked for."""

    def __init__(self, study: Study, arms: Sequence[str], seeds: Sequence[int]) -> None:
        self.records: dict[str, dict[int, dict]] = {}
        for name in arms:
            for seed in seeds:
                record = study.result(name, seed)
                if record is not None:
                    self.records.setdefault(name, {})[seed] = record
        self.figures: dict[str, dict[int, Figures]] = {}
        for name, by_seed in self.records.items():
            for seed, record in by_seed.items():
                sft = self.records.get(companion(ARMS[name], "sft"), {}).get(seed)
                grouped = self.records.get(companion(ARMS[name], "default"), {}).get(seed)
                self.figures.setdefault(name, {})[seed] = figures(record, sft, grouped)
        for name in self.figures:
            self._against_frontier(name)

    def values(self, arm: str, measure: str) -> dict[int, float]:
        """By seed."""
        there = self.figures.get(arm, {})
        return {seed: each[measure] for seed, each in there.items() if measure in each}

    def mean(self, arm: str, measure: str, seeds: Collection[int] | None = None) -> float | None:
        """Over these seeds, None where the arm has not all of them; or over all that it has."""
        values = self.values(arm, measure)
        over = values.keys() if seeds is None else set(seeds)
        return _mean([values[seed] for seed in over]) if over and over <= values.keys() else None

    def paired(self, ours: str, theirs: str, measure: str) -> Interval | None:
        """ours - theirs over the seeds that both have."""
        return difference(self.values(ours, measure), self.values(theirs, measure))

    def sweep(self, world: str) -> list[str]:
        """Plain PPO at every coefficient that was run in this world."""
        return [
            name
            for name, arm in ARMS.items()
            if name in self.figures
            and arm.world == world
            and name.rpartition("/")[2].startswith(PPO)
            and name.rpartition("/")[0] in ("", world)
        ]

    def best_ppo(self, world: str, measure: str, seeds: Sequence[int]) -> str:
        """By its mean over these seeds, which every coefficient has."""
        return max(self.candidates(world), key=lambda name: self.mean(name, measure, seeds))

    def candidates(self, world: str) -> list[str]:
        """For PPO's best: every coefficient above 0. Without a penalty it falls far below the SFT
        model, and where it was run on fewer seeds, these would be all that is left."""
        return [name for name in self.sweep(world) if "kl.coef=0.0" not in ARMS[name].overrides]

    def against_best(
        self, ours: str, measure: str, hindsight: bool = True
    ) -> tuple[Interval | None, str]:
        """ours - PPO at its best coefficient for this measure, and which that is. In hindsight: the
        best on these very seeds, which flatters PPO; else for each seed the best on the others."""
        mine, world = self.values(ours, measure), ARMS[ours].world
        sweep = self.candidates(world)
        seeds = set(mine).intersection(*(self.values(name, measure) for name in sweep))
        if len(sweep) < 3 or len(seeds) < (1 if hindsight else 2):  # the best of one says nothing
            return None, ""
        judged_on = {seed: seeds if hindsight else seeds - {seed} for seed in sorted(seeds)}
        best = {seed: self.best_ppo(world, measure, sorted(on)) for seed, on in judged_on.items()}
        theirs = {seed: self.values(name, measure)[seed] for seed, name in best.items()}
        return difference(mine, theirs), ", ".join(dict.fromkeys(best.values()))

    def _against_frontier(self, name: str) -> None:
        """coef:<measure> and kl:<measure>: what an arm has above PPO's curve at its own mean
        coefficient, and at its own KL. Between PPO's points the curve is straight."""
        sweep = self.sweep(ARMS[name].world)
        if ARMS[name].kind == "evaluate" or name in sweep or not _plain_world(ARMS[name]):
            return
        for seed, mine in self.figures[name].items():
            points = [self.figures[other][seed] for other in sweep if seed in self.figures[other]]
            if len(points) < 3:
                continue
            for prefix, x in (("coef", "coef"), ("kl", "kl_final")):
                xs = [point[x] for point in points]
                for measure in FRONTIER:
                    level = stats.interpolate(mine[x], xs, [point[measure] for point in points])
                    mine[f"{prefix}:{measure}"] = mine[measure] - level

    def own(self, name: str, measure: str) -> Interval | None:
        """A figure of one arm that is a difference already."""
        values = self.values(name, measure)
        return stats.interval(list(values.values())) if values else None

    def win_rate(self, ours: str, theirs: str) -> stats.WinRate | None:
        """By gold on the same prompts, draw against draw with the same random numbers."""
        pairs = []
        for seed, record in self.records.get(ours, {}).items():
            other = self.records.get(theirs, {}).get(seed)
            if other is not None and _same(record, other):
                pairs.append((_answers(record["draws"]), _answers(other["draws"])))
        return stats.win_rate(pairs) if pairs else None

    def self_rate(self, arm: str) -> stats.WinRate | None:
        """One policy against itself, with other random numbers: what a tie looks like."""
        pairs = []
        for record in self.records.get(arm, {}).values():
            draws = record["draws"]
            half = len(draws) // 2
            pairs.append((_answers(draws[:half]), _answers(draws[half : 2 * half])))
        return stats.win_rate(pairs) if pairs else None


def _answers(draws: Sequence[dict]) -> np.ndarray:  # (draws, prompts)
    return np.array([draw["gold"] for draw in draws])


def companion(arm: Arm, name: str) -> str:
    """The arm `name` of the same world, for what is undisturbed there."""
    return name if arm.world == "toy" else f"{arm.world}/{name}"


def _plain_world(arm: Arm) -> bool:
    """Not where PPO's sweep ran under other rewards."""
    return not any(each.startswith("reward.functions") for each in arm.overrides)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    seeds = sorted(ours.keys() & theirs.keys())
    return stats.interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
