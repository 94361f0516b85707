"""Rounds of MetaRM (arXiv 2405.00438; docs/math.md): the reward model follows the policy's shift.

    round n:    answers of policy n-1, unlabelled  ->  reward model n  ->  PPO  ->  policy n

As the policy moves, the reward model tells its answers apart less and less. Each round trains it
further on the ORIGINAL pairs, with a step that looks at today's answers. There are no new labels.

    L     the pairs' loss, as in stage rm
    J     mean over prompts of (2 / k^2) sum_{i<j} sigma(|r_i - r_j|), over k answers of the policy

    none        theta <- theta - alpha grad L(theta)                   the control: plain steps
    literal     ... grad L(theta + eta grad J)                         the paper
    normalised  ... grad L(theta + eta grad J / |grad J|)
    supported   ... grad L(theta - eta grad J / |grad J|)              ours, docs/math.md
    additive    ... grad (L - eta J)(theta)

A round is a run folder of its own, rounds/<n>/, with its models, checkpoints and metrics; rounds/0
keeps the models that the first one began with, and models/ has the newest round's. P prompts, k
answers to each, S = P k sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import gikernels
from trainer import parallel
from trainer.batch.order import batch_indices, batch_of
from trainer.batch.sequences import Sequences, pieces
from trainer.batch.types import Pair, Prompt
from trainer.config import Config
from trainer.data.sources import load_prompts
from trainer.models import loading, roles, sources
from trainer.models.backbone import trained
from trainer.models.policy import Policy
from trainer.models.reward import RewardModel
from trainer.ppo import loop
from trainer.ppo.evaluate import by_label
from trainer.ppo.forward import answer_logprobs, check_engine
from trainer.rewards.judge import make_judge
from trainer.rollout.engine import Rollout
from trainer.rollout.make import make_engine
from trainer.runs import files
from trainer.runs.averages import Averages, Timer
from trainer.runs.checkpoint import finished, mark_finished, unmark
from trainer.runs.console import say
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.loop import Metrics, Stage, log_of, train
from trainer.runs.optim import Optimizer
from trainer.stages import reward_model

STAGE, ROUND = "metarm", "round"
"""Names of marks: a round's reward model is trained; a round is over."""


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    rounds = config.metarm.rounds
    keep_beginning(run)
    done = 0
    while resume and done < rounds and finished(run.round(done + 1), ROUND, 1):
        done += 1
    if resume and done == rounds:
        refuse_damage(run)
        say("metarm is done")
        return
    t = Setup.of(config, run)
    with log_of(config, run, (STAGE,), done) as log:
        if done == 0:
            _, figures = judge(t, run.round(0), sample_test(t, t.sft))
            now = sample_test(t, str(run.round(0).model("policy")))
            log.write(STAGE, 0, figures_as("after", figures) | standing(t, run.round(0), now))
        else:
            now = sample_test(t, str(run.round(done).model("policy")))
        for n in range(done + 1, rounds + 1):
            before, after = run.round(n - 1), run.round(n)
            refuse_damage(before)
            say(f"metarm round {n} of {rounds}: {config.metarm.variant}")
            if not (resume and finished(after, STAGE, config.metarm.steps)):
                train(config, after, Round(t, n, before, after), resume)
            metrics = compare(t, before, after, now)
            inner = round_config(t, n)
            loop.run(inner, after, resume)
            now = sample_test(t, str(after.model("policy")))
            metrics |= standing(t, after, now)
            log.write(STAGE, n, metrics)
            say(f"metarm round {n}: {headline(metrics)}")
            deploy(after, run)
            mark_finished(after.checkpoints(ROUND), 1)
            parallel.barrier()


class Round(Stage):
    """A round's reward model, from the one before: on the pairs, with an eye on answers of the
    policy as it is now."""

    name = STAGE

    def __init__(self, t: Setup, n: int, before: RunFolder, after: RunFolder) -> None:
        settings = t.config.metarm
        self.t, self.n, self.after, self.steps = t, n, after, settings.steps
        self.answers = sample_meta(t, str(before.model("policy")), n)
        self.model = roles.trained_reward_model(str(before.model("rm")), t.precise).train()
        self.guard = Guard(t.config.trainer.max_skipped)
        self.optimizer = Optimizer.of(
            t.config.rm,
            [(settings.lr, trained(self.model).values())],
            self.guard,
            "reward model",
            t.config.trainer,
            decay_until=settings.steps,
        )
        self.state = roles.state("reward", self.model, self.optimizer, self.guard)

    def step(self, step: int) -> Metrics:
        t, timer, averages = self.t, Timer(), Averages()
        settings, seed = t.config.metarm, t.config.run.seed
        with timer("data"):
            size = t.config.rm.batch
            indices = batch_of(t.pairs, size, step, seed, "metarm", self.n)
            pairs = [t.pairs[i] for i in indices]
            both = reward_model.both_answers(pairs)
            prompts = batch_indices(
                settings.meta_prompts, settings.meta_batch, step, seed, "meta answers", self.n
            )
            where = torch.tensor(prompts)
            meta = self.answers.rows(rows_of(where, settings.samples))
        with timer("train"):
            meta_step(t.precise, self.model, pairs, both, meta, averages)
            norm = self.optimizer.step(step, averages.open["rm/loss"])
            averages.add("rm", {"grad_norm": norm / parallel.world_size()})
            averages.update("rm")
            averages.update(STAGE)
            metrics = averages.means()
        metrics["rm/lr"] = settings.lr * self.optimizer.factor(step)
        return metrics | timer.metrics(int(both.lengths.sum() + meta.lengths.sum()))

    def headline(self, metrics: Metrics) -> Metrics:
        return {"loss": metrics["rm/loss"], "spread": metrics["metarm/spread"]}

    def save(self) -> None:
        dtype = parallel.compute_dtype(self.t.config)
        self.model.save(self.after.model("rm"), self.t.tokenizer, dtype)


def meta_step(
    config: Config,
    model: RewardModel,
    pairs: Sequence[Pair],
    both: Sequences,  # their answers, as `reward_model.both_answers` puts them
    meta: Sequences,  # (P k) answers of the policy, those to a prompt side by side
    averages: Averages,
) -> None:
    """Leaves in .grad what the optimiser descends, and theta as it was."""
    variant, eta = config.metarm.variant, config.metarm.step
    ascent: contextlib.AbstractContextManager = contextlib.nullcontext()
    if variant == "none":
        backward_spread(config, model, meta, 0.0, averages)
    elif variant == "additive":
        backward_spread(config, model, meta, -eta, averages)
    else:
        backward_spread(config, model, meta, 1.0, averages)
        length = -eta if variant == "supported" else eta
        normalise = variant != "literal"
        ascent = gikernels.meta_ascent(trained(model).values(), length, normalise=normalise)
    with ascent:
        reward_model.backward(config, model, pairs, both, averages)


def backward_spread(
    config: Config, model: RewardModel, meta: Sequences, weight: float, averages: Averages
) -> None:
    """Adds weight * grad J; 0: J is only looked at. A prompt's answers stay in one micro-batch."""
    k = config.metarm.samples
    costs = meta.lengths.view(-1, k).sum(1).tolist()  # (P)
    with torch.set_grad_enabled(weight != 0):
        for prompts, real in pieces(costs, config.trainer.tokens_per_microbatch):
            rewards = model(meta.rows(rows_of(prompts, k))).view(-1, k)
            spread = gikernels.difference_objective(rewards)
            spread = spread * real * len(prompts) / len(costs)
            if weight:
                (weight * spread).backward()
            averages.add(STAGE, {"spread": spread})


def rows_of(prompts: Tensor, samples: int) -> Tensor:
    """(P) -> (P k): where the answers to these prompts stand."""
    return (prompts.unsqueeze(1) * samples + torch.arange(samples)).flatten()


@dataclass(frozen=True)
class Setup:
    config: Config
    precise: Config  # the same, with the precision of the meta step
    run: RunFolder
    sft: str  # what the KL penalty holds on to
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[Pair]
    held_out: Sequence[Pair]
    meta_prompts: Sequence[Prompt]  # answered for training
    test_prompts: list[Prompt]  # answered for measuring

    @staticmethod
    def of(config: Config, run: RunFolder) -> Setup:
        sft = sources.reference_source(config, run)
        tokenizer = loading.load_tokenizer(sft, config)
        pairs, held_out = reward_model.split_pairs(config, run, tokenizer, again=False)
        if config.metarm.prompts == "ood":
            there = load_prompts(config, "ood", tokenizer)
            meta, test = there[::2], there[1::2]
        else:
            meta = load_prompts(config, "train", tokenizer)
            test = load_prompts(config, "eval", tokenizer) or meta
        order = batch_indices(len(test), len(test), 0, config.run.seed, "test prompts")
        return Setup(
            config=config,
            precise=precise(config),
            run=run,
            sft=sft,
            tokenizer=tokenizer,
            pairs=pairs,
            held_out=held_out,
            meta_prompts=meta,
            test_prompts=[test[i] for i in order[: config.metarm.test_prompts]],
        )


def precise(config: Config) -> Config:
    """The configuration that the meta step computes with."""
    model = dataclasses.replace(config.model, dtype=config.metarm.dtype)
    return dataclasses.replace(config, model=model)


def round_config(t: Setup, n: int) -> Config:
    """PPO of round n as a run of its own, with random numbers and prompts of its own."""
    config, settings = t.config, t.config.metarm
    before, after = t.run.round(n - 1), t.run.round(n)
    start = str(before.model("policy")) if settings.policy == "previous" else t.sft
    inner = dataclasses.replace(
        config,
        run=dataclasses.replace(
            config.run,
            seed=config.run.seed + 1_000_000 * n,
            stages=("ppo",),
            output=str(after.path),
        ),
        model=dataclasses.replace(
            config.model, policy=start, reference=t.sft, reward=str(after.model("rm"))
        ),
        ppo=dataclasses.replace(config.ppo, steps=settings.ppo_steps or config.ppo.steps),
        metarm=dataclasses.replace(settings, rounds=0),
        baselines={},
    )
    if parallel.is_main():
        after.path.mkdir(parents=True, exist_ok=True)
        files.write(after.config, inner.to_yaml())
    return inner


def keep_beginning(run: RunFolder) -> None:
    """What the rounds begin with, aside: models/ is about to have later ones."""
    if parallel.is_main() and not run.round(0).path.is_dir():
        aside = files.aside_of(run.round(0).path)
        for name in ("rm", "policy"):
            files.copy(run.model(name), RunFolder(aside).model(name))
        files.replace(aside, run.round(0).path)
    parallel.barrier()


def undo(run: RunFolder) -> None:
    """models/ as before the rounds, and no rounds: for a stage that is done again. On one rank.

    Killed in it at any moment and called again, it comes to the same end. Marks go first, so that a
    run which goes on instead does the rounds again; `rounds` is renamed before it is removed.
    """
    for path in run.rounds.glob("[0-9]*"):
        for stage in (ROUND, STAGE, "ppo"):
            unmark(RunFolder(path).checkpoints(stage))
    if run.round(0).path.is_dir():
        deploy_here(run.round(0), run)
    if run.rounds.is_dir():
        MetricsLog(run, (STAGE,), 0, ()).close()
        files.remove(run.rounds)


def deploy(made: RunFolder, run: RunFolder) -> None:
    """A round's models become the run's."""
    if parallel.is_main():
        deploy_here(made, run)
    parallel.barrier()


def deploy_here(made: RunFolder, run: RunFolder) -> None:
    for name in ("rm", "policy"):
        files.copy(made.model(name), run.model(name))


def refuse_damage(run: RunFolder) -> None:
    for name in ("rm", "policy"):
        files.refuse_damage(
            run.model(name), "put back a copy, or do the rounds again: gi metarm, without --resume"
        )


@dataclass(frozen=True)
class Answers:
    prompts: list[Prompt]  # one a sequence
    sequences: Sequences  # (S)
    samples: int  # k
    kl: Tensor  # (S) to the SFT model, nats
    gold: Tensor | None  # (S) where a program can judge


def sample(t: Setup, policy: Policy, prompts: list[Prompt], *names: object) -> Rollout:
    """k answers a prompt; a function of the policy and the names alone."""
    engine = make_engine(t.config, t.tokenizer)
    engine.sync(policy)
    draws = parallel.generator(t.config.run.seed, STAGE, *names)
    rollout = engine.generate([p.ids for p in prompts], t.config.metarm.samples, draws)
    engine.rest()
    check_engine(t.config, engine, rollout, policy)
    return rollout


def sample_meta(t: Setup, policy: str, n: int) -> Sequences:
    """(meta_prompts * k), those to a prompt side by side."""
    count, seed = t.config.metarm.meta_prompts, t.config.run.seed
    chosen = batch_indices(len(t.meta_prompts), count, n, seed, "meta prompts")
    prompts = [t.meta_prompts[i] for i in chosen]
    ours = loading.load_policy(policy, t.config)
    return sample(t, ours, prompts, "meta", n).sequences


def sample_test(t: Setup, policy: str) -> Answers:
    """The same prompts and random numbers every time: what differs is the policy."""
    k, config = t.config.metarm.samples, t.config
    ours, theirs = (loading.load_policy(name, config) for name in (policy, t.sft))
    rollout = sample(t, ours, t.test_prompts, "test")
    sequences, prompts = rollout.sequences, [p for p in t.test_prompts for _ in range(k)]
    shifted = answer_logprobs(config, ours, rollout) - answer_logprobs(config, theirs, rollout)
    shift = config.metarm.prompts == "ood"
    by_program = make_judge(
        config, config.data.ood_prompts if shift else config.data.eval_prompts, t.tokenizer
    )
    return Answers(
        prompts=prompts,
        sequences=sequences,
        samples=k,
        kl=sequences.sums(shifted),
        gold=by_program(prompts, sequences) if by_program else None,
    )


def judge(t: Setup, made: RunFolder, answers: Answers) -> tuple[Tensor, dict[str, float]]:
    """Scores (S) by the reward model of this folder, as PPO will have it, and how well it tells
    these answers apart.

    `scale` is the mean difference within held-out pairs: any training that raises the spread raises
    the scale as well, so `spread` and its quantiles are multiples of it. They and `gold_accuracy`
    are over pairs of different answers to a prompt; equal ones say something of the policy only.
    """
    model = loading.load_reward_model(str(made.model("rm")), t.config)
    scores = reward_model.scores(t.config, model, answers.sequences)
    figures = {"objective": float(gikernels.difference_objective(scores.view(-1, answers.samples)))}
    first, second = different_pairs(answers)
    gap = scores[first] - scores[second]
    if t.held_out:
        held_out = reward_model.both_answers(t.held_out)
        chosen, rejected = reward_model.scores(t.config, model, held_out).chunk(2)
        figures["pair_accuracy"] = float((chosen > rejected).float().mean())
        figures["scale"] = float((chosen - rejected).abs().mean())
        if len(gap):
            relative = gap.abs() / max(figures["scale"], 1e-12)
            figures["spread"] = float(relative.mean())
            for share in (10, 50, 90):
                figures[f"spread_p{share}"] = float(relative.quantile(share / 100))
    if answers.gold is not None:
        better = answers.gold[first] - answers.gold[second]
        told = better != 0
        if bool(told.any()):
            right = (gap[told] * better[told] > 0).float() + 0.5 * (gap[told] == 0).float()
            figures["gold_accuracy"] = float(right.mean())
    return scores, figures


def different_pairs(answers: Answers) -> tuple[Tensor, Tensor]:
    """Rows (n), (n): every two answers to a prompt that are not the same."""
    texts, k = answers.sequences.answers(), answers.samples
    rows = [
        (i, j)
        for start in range(0, len(texts), k)
        for i in range(start, start + k)
        for j in range(i + 1, start + k)
        if texts[i] != texts[j]
    ]
    both = torch.tensor(rows, dtype=torch.long, device=answers.kl.device).view(-1, 2)
    return both[:, 0], both[:, 1]


def compare(t: Setup, before: RunFolder, after: RunFolder, answers: Answers) -> dict[str, float]:
    """The old and the new reward model on today's answers; scores of both go to answers.jsonl."""
    old, figures = judge(t, before, answers)
    new, figures_new = judge(t, after, answers)
    texts = t.tokenizer.batch_decode(answers.sequences.answers())
    gold = answers.gold.tolist() if answers.gold is not None else [None] * len(texts)
    columns = zip(answers.prompts, texts, old.tolist(), new.tolist(), gold)
    if parallel.is_main():
        lines = [
            {"prompt": prompt.text, "response": text, "before": a, "after": b, "gold": g}
            for prompt, text, a, b, g in columns
        ]
        files.write(after.answers, "".join(json.dumps(line) + "\n" for line in lines))
    return figures_as("before", figures) | figures_as("after", figures_new)


def figures_as(name: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in figures.items()}


def standing(t: Setup, made: RunFolder, answers: Answers) -> dict[str, float]:
    """Where the policy stands after a round; `distinct`: share of a prompt's answers that are."""
    model = loading.load_reward_model(str(made.model("rm")), t.config)
    columns = {"proxy": reward_model.scores(t.config, model, answers.sequences), "kl": answers.kl}
    if answers.gold is not None:
        columns["gold"] = answers.gold
    texts, k = answers.sequences.answers(), answers.samples
    distinct = [len({tuple(a) for a in texts[i : i + k]}) / k for i in range(0, len(texts), k)]
    metrics = {f"policy/{name}": float(column.mean()) for name, column in columns.items()}
    metrics["policy/distinct"] = sum(distinct) / len(distinct)
    return metrics | by_label(columns, [p.domain for p in answers.prompts], "domain")


def headline(metrics: dict[str, float]) -> str:
    names = ("before/gold_accuracy", "after/gold_accuracy", "before/spread", "after/spread")
    shown = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
    shown += [f"{key} {value:.3f}" for key, value in metrics.items() if key.startswith("policy/")]
    return "  ".join(shown)
