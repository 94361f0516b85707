"""Stage 1, supervised fine-tuning: the mean negative log-probability of demonstrated answers."""

from __future__ import annotations

from trainer import parallel
from trainer.batch.order import batch_of
from trainer.batch.sequences import Sequences
from trainer.config import Config
from trainer.data.sources import load_demonstrations
from trainer.models import loading, roles
from trainer.models.backbone import trained
from trainer.models.policy import log_probabilities
from trainer.runs.averages import Averages, Timer
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.loop import Metrics, Stage, done, train
from trainer.runs.optim import Optimizer


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    if not done(run, "sft", config.sft.steps, resume):
        train(config, run, Sft(config, run), resume)


class Sft(Stage):
    name = "sft"

    def __init__(self, config: Config, run: RunFolder) -> None:
        settings = config.sft
        self.config, self.run, self.steps = config, run, settings.steps
        self.tokenizer = loading.load_tokenizer(config.model.policy, config)
        self.demonstrations = load_demonstrations(config, self.tokenizer)
        self.policy = roles.sft_policy(config, run).train()
        self.guard = Guard(config.trainer.max_skipped)
        self.optimizer = Optimizer.of(
            settings,
            [(settings.lr, trained(self.policy).values())],
            self.guard,
            "policy",
            config.trainer,
            decay_until=settings.steps,
        )
        self.state = roles.state("policy", self.policy, self.optimizer, self.guard)

    def step(self, step: int) -> Metrics:
        config, timer, averages = self.config, Timer(), Averages()
        with timer("data"):
            size, seed = config.sft.batch, config.run.seed
            chosen = batch_of(self.demonstrations, size, step, seed, "sft")
            prompts, answers = zip(*(self.demonstrations[i] for i in chosen))
            batch = Sequences.of(list(prompts), list(answers))
        with timer("train"):
            for rows, weight in batch.pieces(config.trainer.tokens_per_microbatch):
                stats = self.policy(batch.rows(rows), log_probabilities())
                loss = -weight * stats.logprobs.sum() / batch.count
                loss.backward()
                averages.add("sft", {"loss": loss})
            norm = self.optimizer.step(step, averages.open["sft/loss"])
            averages.add("sft", {"grad_norm": norm / parallel.world_size()})
            averages.update("sft")
            metrics = averages.means()
        metrics["sft/lr"] = config.sft.lr * self.optimizer.factor(step)
        return metrics | timer.metrics(int(batch.lengths.sum()))

    def headline(self, metrics: Metrics) -> Metrics:
        return {"loss": metrics["sft/loss"]}

    def save(self) -> None:
        dtype = parallel.compute_dtype(self.config)
        roles.save_base(self.policy, self.run.model("sft"), self.tokenizer, dtype)
