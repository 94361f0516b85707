"""The sections of the page: title, what the reader should know, and which panels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.report.charts import (
    MOST,
    Chart,
    bars,
    contingency,
    group_label,
    histogram,
    over_evaluations,
    over_steps,
    paths,
    runs_over_steps,
    shade,
    timing,
)
from trainer.report.colours import SCALE, SFT_NAME
from trainer.report.runs import Run, has_gold, numbers_of, read_lines
from trainer.runs import log
from trainer.runs.names import file_name

Panels = list[Chart | None]


def _performance(runs: list[Run]) -> Panels:
    measure = "gold" if has_gold(runs) else "score"
    best = "Gold" if measure == "gold" else "Proxy"
    mean = "eval/gold" if measure == "gold" else "eval/proxy"
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    return [
        over_evaluations(
            runs,
            f"eval/worst_domain_{measure}",
            f"{best}, worst domain",
            "What the method is for.",
        ),
        over_evaluations(runs, mean, f"{best}, mean over domains"),
        over_evaluations(runs, "eval/gap", "Gap: best less worst domain", "Lower is more even."),
        *(
            over_evaluations(runs, f"domain/{domain}/{measure}", f"{best}: {domain}")
            for domain in hardest(runs, domains, measure)
        ),
        over_evaluations(
            runs,
            f"eval/ood_{'gold' if measure == 'gold' else 'proxy'}",
            f"{best}, out of distribution",
            "Prompts that training never has.",
        ),
    ]


def hardest(runs: list[Run], domains: list[str], measure: str) -> list[str]:
    """As many as get a plot each: those where the first run ends lowest, in their own order."""
    last = next((run.final for run in runs if run.final), None) or {}
    figures = {name: last.get(f"domain/{name}/{measure}") for name in domains}
    known = {name: float(x) for name, x in figures.items() if x is not None}
    low = sorted(known, key=lambda name: known[name])[:MOST]
    return [name for name in domains if name in low or (not known and len(domains) <= MOST)]


def _exact(runs: list[Run]) -> Panels:
    """Where answers are right or wrong."""
    lines = [line for run in runs for line in run.evaluations]
    keys = dict.fromkeys(key for line in lines for key in line)
    shares = [key.removeprefix("eval/") for key in keys if key.startswith("eval/pass@")]
    shares = [share for share in shares if share[-1].isdigit()]
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    shifts = [key.split("/")[1] for key in keys if key.startswith("ood/")]
    within = "Thin lines: 95 % intervals over prompts."
    panels: Panels = []
    for share in shares:
        panels += [
            bars(runs, domains, "domain", share, f"{share} by family", within),
            bars(
                runs, list(dict.fromkeys(shifts)), "ood", share,
                f"{share}, out of distribution", within,
            ),
            over_evaluations(runs, f"eval/{share}", f"{share}, mean"),
        ]  # fmt: skip
    if shares:
        panels += [
            bars(
                runs, domains, "domain", "malformed", "Answers of a wrong form",
                "Cut off, or nothing that could be an answer. They count as wrong above.",
            ),
            over_evaluations(runs, "eval/malformed", "Answers of a wrong form, mean"),
        ]  # fmt: skip
    return panels


def _optimisation(runs: list[Run]) -> Panels:
    panels: Panels = [
        over_evaluations(runs, "eval/proxy", "Proxy: what training sees"),
        over_evaluations(runs, "eval/kl", "KL from the SFT model, nats a sequence"),
    ]
    if has_gold(runs):
        panels += [
            paths(
                runs,
                "eval/proxy",
                "eval/gold",
                "Proxy against gold",
                ("proxy", "gold"),
                "From the open circle (SFT) to the large dot. Right and up: learning. Right and "
                "down: the reward model is being exploited.",
            ),
            paths(
                runs,
                "eval/kl",
                "eval/gold",
                "KL against gold",
                ("KL", "gold"),
                "Higher at equal KL is better.",
            ),
            paths(
                runs,
                "eval/kl",
                "eval/worst_domain_gold",
                "KL against the worst domain's gold",
                ("KL", "gold, worst domain"),
                "Higher at equal KL is better.",
            ),
        ]
    panels.append(
        paths(
            runs,
            "eval/kl",
            "eval/proxy",
            "KL against reward: the frontier",
            ("KL", "proxy"),
            "How much proxy each nat of KL buys.",
        )
    )
    return panels


def _groups(runs: list[Run]) -> Panels:
    panels: Panels = []
    for run in runs:
        if not run.groups:
            continue
        lines, many = run.stage("ppo"), sum(bool(each.groups) for each in runs) > 1
        suffix = f" ({run.name})" if many else ""
        for metric, title, caption in (
            ("score", "Score by group", "Group 0 is the hardest."),
            ("kl", "KL by group", ""),
            ("share", "Share of groups in the data", "Of the prompts as they come."),
            ("mass", "Share of groups in training", "Of the prompts that were drawn."),
            ("kl_coef", "KL coefficient by group", "Below the others: relaxed there."),
            ("weight", "Weight on advantages", "Above 1: the group is pushed harder."),
        ):
            keys = {
                f"group/{group}/{metric}": (group_label(group, run.groups), shade(i))
                for i, group in enumerate(run.groups)
            }
            name = f"group_{metric}_{file_name(run.name)}"
            panels.append(over_steps(run, lines, keys, title + suffix, name, caption, "PPO step"))
        keys = {"group/gap": ("gap", SCALE[0]), "group/variance": ("variance", SCALE[2])}
        panels.append(
            over_steps(
                run, lines, keys, f"Gap and variance{suffix}", f"group_gap_{file_name(run.name)}",
                "Of the groups' returns.", "PPO step",
            )
        )  # fmt: skip
        panels.append(contingency(run))
    return panels


def _metarm(runs: list[Run]) -> Panels:
    """All rounds in two rows, and then a row for each."""
    panels: Panels = []
    those = [run for run in runs if run.stage("metarm")]
    for run in those:
        suffix = f" ({run.name})" if len(those) > 1 else ""
        old, new = ("before", SFT_NAME), ("after", run.colour)
        for name, title, keys, caption in (
            (
                "accuracy",
                "Reward model's accuracy",
                {
                    "before/gold_accuracy": ("by gold, before", SCALE[3]),
                    "after/gold_accuracy": ("by gold, after", SCALE[0]),
                    "after/pair_accuracy": ("held-out pairs", SFT_NAME),
                },
                "On answers of the policy as it is at the start of the round.",
            ),
            (
                "spread",
                "Relative differences of rewards",
                {"before/spread": old, "after/spread": new},
                "Mean, in units of the difference within held-out pairs.",
            ),
            (
                "objective",
                "J on today's answers",
                {"before/objective": old, "after/objective": new},
                "Any training that makes rewards larger raises it.",
            ),
            (
                "policy",
                "Policy after the round",
                {"policy/proxy": ("proxy", SCALE[2]), "policy/gold": ("gold", SCALE[0])},
                "Proxy is the score by the round's own reward model.",
            ),
            ("kl", "KL from the SFT model", {"policy/kl": ("", run.colour)}, "Nats a sequence."),
            (
                "distinct",
                "Distinct answers, share",
                {"policy/distinct": ("", run.colour)},
                "Of a prompt's answers. Where it falls there is little left to tell apart.",
            ),
        ):
            name = f"metarm_{name}_{file_name(run.name)}"
            panels.append(_by_round(run, run.stage("metarm"), keys, title + suffix, name, caption))
        for line in run.stage("metarm")[1:]:
            panels += _one_round(run, line, suffix)
    return panels


def _one_round(run: Run, line: dict[str, Any], suffix: str) -> Panels:
    """Differences of rewards, the reward model's training, and PPO with what came out of it."""
    n = line["step"]
    folder, name = run.folder / "rounds" / str(n), f"metarm_round_{n}_{file_name(run.name)}"
    inner = Run(
        run.name, folder, run.colour, lines=numbers_of(read_lines(folder / "metrics.jsonl"))
    )
    differences = {
        when: (differences_of_rewards(folder, when, line.get(f"{when}/scale")), colour, run.name)
        for when, colour in (("before", SFT_NAME), ("after", run.colour))
    }
    return [
        histogram(
            differences,
            f"Round {n}: differences of rewards{suffix}",
            "difference, relative",
            f"{name}_differences",
            "Between answers to one prompt; 1 is the mean within held-out pairs. More to the "
            "right: told apart better, rightly or wrongly.",
        ),
        over_steps(
            inner,
            inner.stage("metarm"),
            {"rm/pair_loss": ("pairs' loss", SCALE[3]), "metarm/spread": ("J", SCALE[0])},
            f"Round {n}: training the reward model{suffix}",
            f"{name}_training",
            "J is that of the step's answers.",
            f"step of round {n}",
        ),
        _by_round(
            inner,
            inner.evaluations,
            {"eval/proxy": ("proxy", SCALE[2]), "eval/gold": ("gold", SCALE[0])},
            f"Round {n}: PPO with it{suffix}",
            f"{name}_ppo",
            "On the evaluation prompts.",
            f"PPO step of round {n}",
        ),
    ]


def differences_of_rewards(folder: Path, when: str, scale: float | None) -> list[float]:
    """Between every two different answers to a prompt, in units of `scale`."""
    answers: dict[str, dict[str, float]] = {}
    for line in log.read_lines(folder / "answers.jsonl"):
        prompt, response, score = (line.get(name) for name in ("prompt", "response", when))
        if isinstance(prompt, str) and isinstance(response, str) and isinstance(score, float):
            answers.setdefault(prompt, {})[response] = score
    return [
        abs(a - b) / scale
        for scores in answers.values()
        for a, b in itertools.combinations(scores.values(), 2)
        if scale
    ]


def _rewards(runs: list[Run]) -> Panels:
    def of(run: Run, key: str) -> list[float]:
        return [line[key] for line in run.final_samples if line.get(key) is not None]

    panels: Panels = [
        histogram(
            {run.name: (of(run, key), run.colour, run.name) for run in runs},
            f"{label}, last evaluation",
            label.lower(),
            f"histogram_{key}",
        )
        for key, label in (("score", "Proxy"), ("gold", "Gold"), ("kl", "KL"))
    ]
    for run in runs:
        for by in ("domain", "group"):
            labels = sorted({str(s[by]) for s in run.final_samples if s.get(by) is not None})[:MOST]
            values = {
                (group_label(label, labels) if by == "group" else label): (
                    [
                        line["score"]
                        for line in run.final_samples
                        if str(line.get(by)) == label and line.get("score") is not None
                    ],
                    shade(i),
                    run.name,
                )
                for i, label in enumerate(labels)
            }
            if len(values) > 1:
                title = f"Proxy by {by}"
                name = f"histogram_score_by_{by}_{file_name(run.name)}"
                panels.append(histogram(values, title, "proxy", name, run.name))
    return panels


def _training(runs: list[Run]) -> Panels:
    first = runs[:1]
    panels: Panels = [
        runs_over_steps(first, "sft", "sft/loss", "SFT loss"),
        runs_over_steps(first, "rm", "rm/loss", "Reward model's loss"),
        runs_over_steps(first, "rm", "rm/accuracy", "Reward model's accuracy on pairs"),
    ]
    for key, title, caption in (
        ("objective/scores", "Scores of training answers", ""),
        ("objective/kl", "KL in training, nats a sequence", ""),
        ("objective/kl_coef", "Mean KL coefficient", "Compare runs at equal mean, too."),
        ("objective/entropy", "Entropy of the policy", "A fall to 0 is a collapse."),
        ("policy/clipfrac", "Clipped ratios, share", "Above 0.3: steps are too large."),
        ("policy/approxkl", "Step's own KL", ""),
        ("policy/grad_norm", "Policy's gradient norm", ""),
        ("value/explained_var", "Critic: explained variance", "Below 0: worse than a constant."),
        ("rollout/length", "Length of answers", "A drift upward may be a shortcut."),
        ("rollout/truncated", "Truncated answers, share", ""),
        (
            "rollout/logprob_diff_max",
            "Log-probs: engine against trainer",
            "Largest difference; it should stay near rounding.",
        ),
    ):
        panels.append(runs_over_steps(runs, "ppo", key, title, caption))
    panels += [timing(run) for run in runs]
    return panels


def _by_round(
    run: Run,
    lines: list[dict[str, Any]],
    keys: dict[str, tuple[str, str]],
    title: str,
    name: str,
    caption: str,
    x: str = "round",
) -> Chart | None:
    """A dot for each, from the first on."""
    return over_steps(run, lines, keys, title, name, caption, x, style="dots", least=1)


def everything_else(runs: list[Run], shown: set[str]) -> list[Chart]:
    """A chart for each metric that has none yet, by the names of those who have."""
    keys = dict.fromkeys(
        (str(line["stage"]), key)
        for run in runs
        for line in run.lines
        for key in line
        if key not in ("stage", "step", "policy")
    )
    charts = [runs_over_steps(runs, stage, key, f"{stage}: {key}") for stage, key in sorted(keys)]
    return [chart for chart in charts if chart and chart.name not in shown]


SECTIONS: tuple[tuple[str, str, Callable[[list[Run]], Panels]], ...] = (
    (
        "Performance by domain",
        "Answers to evaluation prompts, the same at every step. The domains exist for this page "
        "only: the method does not see them.",
        _performance,
    ),
    (
        "Right answers",
        "pass@1 is the share of answers that are right, pass@k the share of prompts that at least "
        "one of k answers gets right.",
        _exact,
    ),
    (
        "Proxy, gold and KL",
        "Proxy is the score that training maximises; gold, where a program can judge, is what was "
        "meant, and trains nothing.",
        _optimisation,
    ),
    ("Groups", "What the method inferred during training, and what it did with it.", _groups),
    (
        "MetaRM, round by round",
        "Each round trains the reward model on, over the old pairs, with a look at the policy's "
        "answers, and then the policy with it. First all rounds, then a row for each.",
        _metarm,
    ),
    ("Distribution of rewards", "Answers of the last evaluation.", _rewards),
    ("Training", "Pale: every step. Strong: moving mean.", _training),
)
