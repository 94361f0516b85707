"""Stage 2, the reward model: Bradley-Terry on pairs, with cheap switches (METHODS C).

    loss = -log sigma(r_chosen - r_rejected - margin)                    label smoothing optional
           + centring * mean((r_chosen + r_rejected)^2)                  keeps scores around 0
           + rating * mean((r - rating)^2)                               where ratings exist

The last term is what makes scores of different prompts comparable: pairs alone leave an arbitrary
offset for each prompt, and groups of such scores are noise (METHODS A.2).
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batch.order import batch_indices
from trainer.batch.sequences import Piece, Sequences, forward_all, pieces
from trainer.batch.types import Pair
from trainer.data.errors import DataError
from trainer.data.sources import load_pairs
from trainer.models import loading, sources
from trainer.models.policy import Policy
from trainer.models.reward import RewardModel
from trainer.ppo.forward import check_engine
from trainer.rollout.make import make_engine
from trainer.runs.averages import Averages, Timer
from trainer.runs.checkpoint import Checkpoints, TrainState, finished
from trainer.runs.console import progress, say
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines
from trainer.runs.optim import Optimizer
from trainer.runs.profiling import profiled


def run(config, run: RunFolder, resume: bool = False) -> None:
    seed, settings = config.run.seed, config.rm
    if resume and finished(run, "rm", settings.steps):
        say("rm     is done")
        return
    start = sources.policy_source(config, run)
    tokenizer = loading.load_tokenizer(start, config)
    pairs, validation = split_pairs(config, run, tokenizer, again=not resume)
    model = loading.load_reward_model(start, config, settings.head, tokenizer).train()
    guard = Guard(config.trainer.max_skipped)
    optimizer = Optimizer(
        [(settings.lr, model.parameters())],
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        warmup=settings.warmup,
        decay_until=settings.steps,
        guard=guard,
        name="reward model",
    )
    state = TrainState({"reward": model}, {"reward": optimizer}, {"guard": guard})
    with (
        Checkpoints(config, run, "rm", state, resume) as checkpoints,
        MetricsLog(run, ("rm",), state.step, config.trainer.log) as log,
        progress("rm", settings.steps, state.step, config.trainer.progress) as show,
    ):
        while state.step < settings.steps:
            timer, averages = Timer(), Averages()
            with timer("data"):
                indices = batch_indices(len(pairs), settings.batch, state.step, seed)
                batch = [pairs[i] for i in indices]
                sequences = both_answers(batch, tokenizer.pad_token_id)
            with timer("train"), profiled(config, run, "rm", state.step + 1):
                backward(config, model, batch, sequences, averages)
                norm = optimizer.step(state.step, averages.open["rm/loss"])
                averages.add("rm", {"grad_norm": norm / parallel.world_size()})
                averages.update("rm")
                metrics = averages.means()
            state.step += 1
            metrics["rm/lr"] = settings.lr * optimizer.factor(state.step - 1)
            metrics["guard/skipped"] = guard.skipped
            metrics.update(timer.metrics(int(sequences.lengths.sum())))
            last = state.step == settings.steps
            if validation and (last or state.step % max(1, settings.steps // 5) == 0):
                metrics["rm/validation_accuracy"] = accuracy(config, model, validation, tokenizer)
            log.write("rm", state.step, metrics)
            show({"loss": metrics["rm/loss"], "accuracy": metrics["rm/accuracy"]})
            checkpoints.after_step(log, metrics, guard)
        if validation:
            share = accuracy(config, model, validation, tokenizer)
            say(f"rm     held-out pairs ordered rightly: {share:.1%} of {len(validation)}")
        model.save(run.model("rm"), tokenizer)
        checkpoints.end()


def split_pairs(config, run: RunFolder, tokenizer, again: bool) -> tuple[list[Pair], list[Pair]]:
    """For training, and held out. The toy world's are sampled once, from the SFT model, and lie in
    the run folder for whoever trains on them later; `again`: anew."""
    if config.data.pairs != "toy":
        pairs = load_pairs(config, tokenizer)
    elif not again and parallel.all_true(run.pairs.is_file()):
        pairs = [Pair(**line) for line in read_lines(run.pairs)]
    else:
        policy = loading.load_policy(sources.policy_source(config, run), config)
        pairs = toy_pairs(config, policy, tokenizer)
        if parallel.is_main():
            aside = run.pairs.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in pairs))
            aside.replace(run.pairs)
    check_columns(config.rm, pairs)
    seed = config.run.seed
    pairs = [pairs[i] for i in batch_indices(len(pairs), len(pairs), 0, seed, "validation")]
    held_out = int(len(pairs) * config.rm.validation)
    return pairs[held_out:], pairs[:held_out]


def backward(
    config, model: RewardModel, pairs: list[Pair], sequences: Sequences, averages: Averages
) -> None:
    """Adds the gradient of the pairs' mean loss; `sequences` are their `both_answers`."""
    for rows, weight in pair_pieces(sequences, config.trainer.tokens_per_microbatch):
        both = sequences.rows(torch.cat([rows, rows + len(pairs)]))
        with parallel.autocast(config.model.dtype):
            chosen, rejected = model(both).chunk(2)
        some = [pairs[i] for i in rows.tolist()]
        loss, figures = pair_loss(config.rm, chosen, rejected, some)
        part = weight * len(some) / len(pairs)
        (loss * part).backward()
        averages.add("rm", {k: v * part for k, v in figures.items()})


def check_columns(settings, pairs: list[Pair]) -> None:
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
    settings, chosen: Tensor, rejected: Tensor, pairs: list[Pair]
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


def both_answers(pairs: list[Pair], pad: int) -> Sequences:
    """(2 P): all the chosen answers, then all the rejected ones, so that one forward sees both."""
    prompts = [p.prompt_ids for p in pairs]
    answers = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    return Sequences.of(prompts + prompts, answers, pad)


def pair_pieces(sequences: Sequences, budget: int) -> list[Piece]:
    """Micro-batches of pair indices: a pair's two answers stay together."""
    longer = sequences.lengths.view(2, -1).amax(0)
    return pieces(2 * longer, budget)


def accuracy(config, model: RewardModel, pairs: list[Pair], tokenizer) -> float:
    chosen, rejected = scores(config, model, both_answers(pairs, tokenizer.pad_token_id)).chunk(2)
    return float((chosen > rejected).float().mean())


def scores(config, model: RewardModel, sequences: Sequences) -> Tensor:  # (S)
    with parallel.autocast(config.model.dtype):
        budget = config.trainer.tokens_per_microbatch
        return forward_all(lambda batch: (model(batch),), sequences, budget)[0]


def toy_pairs(config, policy: Policy, tokenizer) -> list[Pair]:
    """Best against worst of several answers of the SFT model, as an annotator of the toy world
    rates them. Random pairs of these answers agree with gold in 3 of 4 cases, these in 19 of 20."""
    from trainer.worlds.toy import World

    world, seed = World(config.toy), config.run.seed
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
    return pairs
