"""Stage 1, supervised fine-tuning: the mean negative log-probability of demonstrated answers."""

from __future__ import annotations

from trainer import parallel
from trainer.batch.order import batch_indices
from trainer.batch.sequences import Sequences
from trainer.data.sources import load_demonstrations
from trainer.models import loading
from trainer.runs.averages import Averages, Timer
from trainer.runs.checkpoint import Checkpoints, TrainState, finished
from trainer.runs.console import progress, say
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.optim import Optimizer
from trainer.runs.profiling import profiled


def run(config, run: RunFolder, resume: bool = False) -> None:
    seed, settings = config.run.seed, config.sft
    if resume and finished(run, "sft", settings.steps):
        say("sft    is done")
        return
    tokenizer = loading.load_tokenizer(config.model.policy, config)
    demonstrations = load_demonstrations(config, tokenizer)
    policy = loading.load_policy(config.model.policy, config).train()
    guard = Guard(config.trainer.max_skipped)
    optimizer = Optimizer(
        [(settings.lr, policy.parameters())],
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        warmup=settings.warmup,
        decay_until=settings.steps,
        guard=guard,
        name="policy",
    )
    state = TrainState({"policy": policy}, {"policy": optimizer}, {"guard": guard})
    with (
        Checkpoints(config, run, "sft", state, resume) as checkpoints,
        MetricsLog(run, ("sft",), state.step, config.trainer.log) as log,
        progress("sft", settings.steps, state.step, config.trainer.progress) as show,
    ):
        while state.step < settings.steps:
            timer, averages = Timer(), Averages()
            with timer("data"):
                chosen = batch_indices(len(demonstrations), settings.batch, state.step, seed, "sft")
                prompts, answers = zip(*(demonstrations[i] for i in chosen))
                batch = Sequences.of(list(prompts), list(answers), tokenizer.pad_token_id)
            with timer("train"), profiled(config, run, "sft", state.step + 1):
                tokens = batch.answer_lengths.sum()
                for rows, weight in batch.pieces(config.trainer.tokens_per_microbatch):
                    with parallel.autocast(config.model.dtype):
                        loss = -weight * policy(batch.rows(rows)).logprobs.sum() / tokens
                    loss.backward()
                    averages.add("sft", {"loss": loss})
                norm = optimizer.step(state.step, averages.open["sft/loss"])
                averages.add("sft", {"grad_norm": norm / parallel.world_size()})
                averages.update("sft")
                metrics = averages.means()
            state.step += 1
            metrics["sft/lr"] = settings.lr * optimizer.factor(state.step - 1)
            metrics["guard/skipped"] = guard.skipped
            metrics.update(timer.metrics(int(batch.lengths.sum())))
            log.write("sft", state.step, metrics)
            show({"loss": metrics["sft/loss"]})
            checkpoints.after_step(log, metrics, guard)
        policy.save(run.model("sft"), tokenizer)
        checkpoints.end()
