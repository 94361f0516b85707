"""Stage 3, group-invariant PPO. Read this first: one iteration is `iteration`, top to bottom.

    prompts -> rollouts -> critic's view, scores -> groups -> experience -> critic, head -> policy

What it adds to textbook PPO (arXiv 2310.11971; docs/math.md): groups of easy and hard sequences,
found without labels; prompts drawn by group (ours); a KL coefficient for each sequence, relaxed
where it is hard; a weight on each sequence's advantage, which evens out the groups' returns.
`groups.inference=none` is plain PPO; `groups.draw=none` takes prompts as they come,
`kl.adaptive=false` drops the KL coefficients, `groups.beta=0` the weights.

What it leaves out: importance sampling for stale rollouts (there are none; `ppo.importance` is for
an engine that rounds otherwise than the trainer), value normalisation, adaptive learning rates.
S sequences (prompts x samples), T padded answer tokens, M groups.
"""

from __future__ import annotations

from trainer import parallel
from trainer.config import Config
from trainer.models import sources
from trainer.models.critic import Critic
from trainer.ppo.build import Setup
from trainer.ppo.draw import draw, sample
from trainer.ppo.evaluate import by_label, few_of_each_domain
from trainer.ppo.experience import Batch, assess, mean
from trainer.ppo.forward import prove_adapter, view
from trainer.ppo.groups import Groups
from trainer.ppo.update import groups_now, train_critic, train_policy
from trainer.runs import utilisation
from trainer.runs.averages import Averages, Timer
from trainer.runs.console import say
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.loop import Metrics, Stage, done, train

PROOF = 8
"""Prompts that a run begins by asking, to see whether its adapter is sampled with."""


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    if not done(run, "ppo", config.ppo.steps, resume):
        train(config, run, Ppo(config, run), resume)


def iteration(t: Setup, step: int) -> Metrics:
    """From prompts to a better policy; the order is that of the paper."""
    actors, signals, timer, updates = t.actors, t.signals, Timer(), Averages()
    policy, engine, groups = actors.policy, actors.engine, signals.groups

    with timer("draw"):  # x ~ D: the next prompts, or those that the groups ask for
        chosen = draw(t, step)
        more = signals.reference_scores.fill(
            engine, actors.reference, signals.scorer, t.prompts, chosen
        )
    with timer("sync"):
        engine.sync(policy, step)
    with timer("rollout"):  # y ~ pi
        answers = sample(t, chosen, step)
    # Functions begin in threads, and go on while the critic looks.
    scores = answers.raw or signals.scorer.submit(
        answers.prompts, answers.sequences, answers.rollout.truncated
    )
    with timer("view"):  # values, and the head's logits
        seen = view(t.config, actors.critic, answers.sequences)
    with timer("score"):  # reward model and functions
        raw = scores if isinstance(scores, dict) else signals.scorer.collect(scores)
    if not t.guard.allows("rollout", **{f"reward {k}": x for k, x in raw.items()}, **seen.named):
        return {"objective/scores": mean(raw["total"])} | timer.metrics(answers.tokens)

    with timer("experience"):  # s; p and their order; eta_i; one pass to penalties and advantages
        batch = assess(t, answers, raw, seen, step)
    with timer("critic"):  # stage 1: the policy stands still, critic and head learn
        metrics = train_critic(t, step, batch, updates)
    with timer("policy"):  # stage 2: the groups stand still, the policy learns with c_i * A_it
        probs = groups_now(t, batch)
        weights = groups.weights(probs, batch.performance)
        if step >= t.config.ppo.critic_warmup_steps:
            train_policy(t, step, batch, weights, updates)
    groups.control(batch.probs, batch.experience.seq_kl)
    groups.learn(batch.probs, batch.performance, batch.labels, batch.signal)

    with timer("metrics"):
        metrics |= updates.means() | answers.metrics() | batch.metrics()
        metrics |= groups.metrics(
            probs, batch.performance, raw["total"], batch.experience.seq_kl, batch.kl_coef, weights
        )
        metrics |= by_domain(t, batch) | {"rollout/generated": answers.generated + more}
    return metrics | timer.metrics(answers.tokens)


def by_domain(t: Setup, batch: Batch) -> Metrics:
    columns = {"score": batch.raw["total"]}
    if t.signals.judge is not None:
        columns["gold"] = t.signals.judge(batch.answers.prompts, batch.answers.sequences)
    return by_label(columns, [p.domain for p in batch.answers.prompts], "domain")


class Ppo(Stage):
    """Iterations, and an evaluation now and then."""

    name, streams = "ppo", ("eval",)

    def __init__(self, config: Config, run: RunFolder) -> None:
        self.t = Setup.of(config, run)
        self.config, self.run, self.steps = config, run, config.ppo.steps
        self.state, self.guard = self.t.state, self.t.guard
        say(f"ppo    {self.t.signals.groups.describe()}")

    def begin(self, log: MetricsLog) -> None:
        t = self.t
        some = [prompt.ids for prompt in t.prompts[:PROOF]]
        prove_adapter(self.config, t.actors.engine, t.actors.policy, some)
        if self.state.step == 0:
            metrics, _ = self.evaluated()
            log.write("eval", 0, metrics, policy=sources.start_name(self.config))

    def step(self, step: int) -> Metrics:
        return iteration(self.t, step)

    def headline(self, metrics: Metrics) -> Metrics:
        names = {
            "score": "objective/scores",
            "kl": "objective/kl",
            "worst group": "group/worst",
            "gap": "group/gap",
        }
        return {short: metrics[name] for short, name in names.items() if name in metrics}

    def operations(self) -> float:
        """Sampled by the policy, seen by everyone, and learnt from in every epoch."""
        actors, scorer = self.t.actors, self.t.signals.scorer
        seen = (actors.policy, actors.policy, actors.reference, actors.critic, scorer.model)
        learnt = sum(map(utilisation.training, self.state.models.values()))
        return sum(map(utilisation.forward, seen)) + self.config.ppo.ppo_epochs * learnt

    def look(self, log: MetricsLog) -> Metrics:
        done, every = self.state.step, self.config.eval.every
        last = done == self.steps
        if not (last or (every and done % every == 0)):
            return {}
        metrics, samples = self.evaluated(self.t.actors.critic, self.t.signals.groups)
        log.write("eval", done, metrics, policy="policy")
        few = few_of_each_domain(samples, self.config.eval.final_samples)
        log.write_samples("eval", done, samples if last else few)
        return metrics

    def save(self) -> None:
        dtype = parallel.compute_dtype(self.config)
        self.t.actors.policy.save(self.run.model("policy"), self.t.tokenizer, dtype)

    def evaluated(
        self, critic: Critic | None = None, groups: Groups | None = None
    ) -> tuple[Metrics, list[dict]]:
        """The policy as it is; with critic and groups also by group. The engine stays awake where
        the next rollout wants the same weights."""
        engine, policy = self.t.actors.engine, self.t.actors.policy
        engine.sync(policy, self.state.step)
        out = self.t.evaluator(policy, critic, groups)
        if self.state.step == self.steps:
            engine.rest()
        return out
