"""Stage 2, the reward model: Bradley-Terry on pairs, with cheap switches.

    loss = -log sigma(r_chosen - r_rejected - margin)                    label smoothing optional
           + centring * mean((r_chosen + r_rejected)^2)                  keeps scores around 0
           + rating * mean((r - rating)^2)                               where ratings exist

The last term is what makes scores of different prompts comparable: pairs alone leave an arbitrary
offset for each prompt, and groups of such scores are noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import gikernels
from trainer import parallel
from trainer.batch.order import batch_indices, batch_of
from trainer.batch.sequences import Piece, Sequences, forward_all, pieces
from trainer.batch.types import Pair
from trainer.config import Config, Rm
from trainer.data.errors import DataError
from trainer.data.rows import take
from trainer.data.sources import load_pairs
from trainer.models import loading, roles, sources
from trainer.models.backbone import trained
from trainer.models.policy import Policy
from trainer.models.reward import RewardModel
from trainer.ppo.forward import check_engine
from trainer.rollout.make import make_engine
from trainer.runs import files
from trainer.runs.averages import Averages, Timer
from trainer.runs.console import say
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.loop import Metrics, Stage, done, train
from trainer.runs.optim import Optimizer
from trainer.worlds import registry


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    if not done(run, "rm", config.rm.steps, resume):
        train(config, run, RewardStage(config, run, resume), resume)


class RewardStage(Stage):
    name = "rm"

    def __init__(self, config: Config, run: RunFolder, resume: bool) -> None:
        settings, start = config.rm, sources.policy_source(config, run)
        self.config, self.run, self.steps = config, run, settings.steps
        self.tokenizer = loading.load_tokenizer(start, config)
        self.pairs, self.held_out = split_pairs(config, run, self.tokenizer, again=not resume)
        self.model = roles.trained_reward_model(
            start, config, settings.head, self.tokenizer
        ).train()
        self.guard = Guard(config.trainer.max_skipped)
        self.optimizer = Optimizer.of(
            settings,
            [(settings.lr, trained(self.model).values())],
            self.guard,
            "reward model",
            config.trainer,
            decay_until=settings.steps,
        )
        self.state = roles.state("reward", self.model, self.optimizer, self.guard)

    def step(self, step: int) -> Metrics:
        config, timer, averages = self.config, Timer(), Averages()
        with timer("data"):
            indices = batch_of(self.pairs, config.rm.batch, step, config.run.seed)
            batch = [self.pairs[i] for i in indices]
            sequences = both_answers(batch)
        with timer("train"):
            backward(config, self.model, batch, sequences, averages)
            norm = self.optimizer.step(step, averages.open["rm/loss"])
            averages.add("rm", {"grad_norm": norm / parallel.world_size()})
            averages.update("rm")
            metrics = averages.means()
        metrics["rm/lr"] = config.rm.lr * self.optimizer.factor(step)
        metrics |= timer.metrics(int(sequences.lengths.sum()))
        done, last = step + 1, step + 1 == self.steps
        if self.held_out and (last or done % max(1, self.steps // 5) == 0):
            metrics["rm/validation_accuracy"] = self.accuracy()
        return metrics

    def headline(self, metrics: Metrics) -> Metrics:
        return {"loss": metrics["rm/loss"], "accuracy": metrics["rm/accuracy"]}

    def save(self) -> None:
        if self.held_out:
            share, count = self.accuracy(), len(self.held_out)
            say(f"rm     held-out pairs ordered rightly: {share:.1%} of {count}")
        dtype = parallel.compute_dtype(self.config)
        self.model.save(self.run.model("rm"), self.tokenizer, dtype)

    def accuracy(self) -> float:
        both = both_answers(self.held_out)
        chosen, rejected = scores(self.config, self.model, both).chunk(2)
        return float((chosen > rejected).float().mean())


def split_pairs(
    config: Config, run: RunFolder, tokenizer: PreTrainedTokenizerBase, again: bool
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """For training, and held out. A world's are sampled once, from the SFT model, and lie in
    the run folder for whoever trains on them later; `again`: anew."""
    pairs: Sequence[Pair]
    if not registry.is_world(config.data.pairs):
        pairs = load_pairs(config, tokenizer)
    elif not again and parallel.all_true(run.pairs.is_file()):
        pairs = kept_pairs(run)
    else:
        policy = loading.load_policy(sources.policy_source(config, run), config)
        pairs = sampled_pairs(config, policy, tokenizer)
        if parallel.is_main():
            files.write_lines(run.pairs, [vars(pair) for pair in pairs])
        parallel.barrier()
    check_columns(config.rm, pairs)
    seed = config.run.seed
    pairs = take(pairs, batch_indices(len(pairs), len(pairs), 0, seed, "validation"))
    held_out = int(len(pairs) * config.rm.validation)
    return pairs[held_out:], pairs[:held_out]


def kept_pairs(run: RunFolder) -> list[Pair]:
    lines = files.read_whole_lines(run.pairs)
    if lines is None:
        raise DataError(
            f"{run.pairs}: is not what was written, and the reward model would train on other "
            "pairs: put back a copy, or do stage rm and what follows it again, without --resume"
        )
    return [Pair(**line) for line in lines]


def backward(
    config: Config,
    model: RewardModel,
    pairs: Sequence[Pair],
    sequences: Sequences,
    averages: Averages,
) -> None:
    """Adds the gradient of the pairs' mean loss; `sequences` are their `both_answers`."""
    for rows, weight in pair_pieces(sequences, config.trainer.tokens_per_microbatch):
        both = sequences.rows(torch.cat([rows, rows + len(pairs)]))
        chosen, rejected = model(both).chunk(2)
        some = [pairs[i] for i in rows.tolist()]
        loss, figures = pair_loss(config.rm, chosen, rejected, some)
        part = weight * len(some) / len(pairs)
        (loss * part).backward()
        averages.add("rm", {k: v * part for k, v in figures.items()})


def check_columns(settings: Rm, pairs: Sequence[Pair]) -> None:
    """What a switch needs has to be in the data."""
    wanted = (
        ("margin", settings.margin, ("margin",)),
        ("rating", settings.rating, ("rating_chosen", "rating_rejected")),
    )
    for key, asked, columns in wanted:
        for column in columns if asked else ():
            missing = next((i for i, p in enumerate(pairs) if getattr(p, column) is None), None)
            if missing is not None:
                raise DataError(f"rm.{key}={asked}: pair {missing} of data.pairs has no {column}")


def pair_loss(
    settings: Rm, chosen: Tensor, rejected: Tensor, pairs: list[Pair]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over these pairs, and its parts; chosen and rejected are (P)."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(p, name) for p in pairs], device=chosen.device)

    margin = column("margin") if settings.margin else None
    loss = gikernels.preference_loss(
        chosen, rejected, margin=margin, label_smoothing=settings.label_smoothing
    )
    figures = {
        "pair_loss": loss.detach(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).detach().mean(),
        "score": (chosen + rejected).detach().mean() / 2,
    }
    if settings.centring:
        loss = loss + settings.centring * (chosen + rejected).square().mean()
    if settings.rating:
        rating_loss = (
            (chosen - column("rating_chosen")).square().mean()
            + (rejected - column("rating_rejected")).square().mean()
        ) / 2
        figures["rating_loss"] = rating_loss.detach()
        loss = loss + settings.rating * rating_loss
    return loss, {"loss": loss.detach(), **figures}


def both_answers(pairs: Sequence[Pair]) -> Sequences:
    """(2 P): all the chosen answers, then all the rejected ones, so that one forward sees both."""
    prompts = [p.prompt_ids for p in pairs]
    answers = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    return Sequences.of(prompts + prompts, answers)


def pair_pieces(sequences: Sequences, budget: int) -> list[Piece]:
    """Micro-batches of pair indices: a pair's two answers stay together."""
    return pieces(sequences.lengths.view(2, -1).sum(0).tolist(), budget)


def scores(config: Config, model: RewardModel, sequences: Sequences) -> Tensor:  # (S)
    budget = config.trainer.tokens_per_microbatch
    return forward_all(lambda part: (model(part),), sequences, budget, (False,))[0]


def sampled_pairs(config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Best against worst of several answers of the SFT model, as an annotator of the world rates
    them. Random pairs of these answers agree with gold in 3 of 4 cases, these in 19 of 20."""
    source, seed = config.data.pairs, config.run.seed
    assert registry.has_ids(source)
    world = registry.world(source, config)
    # 0 draws the prompts of PPO, which the reward model should not know by heart.
    prompts = world.annotated(world.prompts(config.rm.pairs, "train", seed=seed + 1), seed)
    engine = make_engine(config, tokenizer)
    engine.sync(policy)
    rollout = engine.generate(
        [p.ids for p in prompts], config.rm.best_of, parallel.generator(seed, "pairs")
    )
    engine.rest()
    check_engine(config, engine, rollout, policy)
    answers = rollout.sequences.answers()
    pairs = []
    for i, prompt in enumerate(prompts):
        mine = answers[i * config.rm.best_of : (i + 1) * config.rm.best_of]
        ratings = world.annotate(prompt.ids, mine, seed=seed)
        best = max(range(len(mine)), key=ratings.__getitem__)
        worst = min(range(len(mine)), key=ratings.__getitem__)
        if mine[best] != mine[worst]:
            pairs.append(
                Pair(
                    prompt_ids=prompt.ids,
                    chosen_ids=mine[best],
                    rejected_ids=mine[worst],
                    margin=ratings[best] - ratings[worst],
                    rating_chosen=ratings[best],
                    rating_rejected=ratings[worst],
                )
            )
    if not pairs:
        raise DataError(
            f"data.pairs: {config.data.pairs}: the SFT model answers each of {len(prompts)} "
            "prompts in one way only, which leaves no pair: raise rollout.temperature, or lower "
            "sft.steps"
        )
    return pairs
