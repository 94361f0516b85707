"""Stage 3, group-invariant PPO. Read this first: one iteration is `iteration`, top to bottom.

    prompts -> rollouts -> scores -> models' view -> groups -> experience -> critic, head -> policy

What it adds to textbook PPO (arXiv 2310.11971; METHODS A): groups of easy and hard sequences, found
without labels; prompts drawn so that each group is met equally often (ours); a KL coefficient for
each sequence, relaxed where it is hard; a weight on each sequence's advantage, which evens out the
groups' returns. `groups.inference=none` is plain PPO; `groups.focus=0` takes prompts as they come,
`kl.adaptive=false` drops the KL coefficients, `groups.beta=0` the weights.

What it leaves out: importance sampling for stale rollouts (there are none; `ppo.importance` is for
an engine that rounds otherwise than the trainer), value normalisation, adaptive learning rates.
S sequences (prompts x samples), T padded answer tokens, M groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batch.order import batch_indices, minibatches
from trainer.batch.sequences import Sequences, forward_all
from trainer.batch.types import Prompt
from trainer.data.sources import load_prompts
from trainer.models import loading, sources
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.ppo.evaluate import Evaluator, by_label, few_of_each_domain
from trainer.ppo.experience import estimate, explained_variance
from trainer.ppo.forward import Forward, check_engine, forward_models
from trainer.ppo.groups import Groups, performance
from trainer.rewards.judge import Judge, make_judge
from trainer.rewards.normaliser import Normaliser
from trainer.rewards.scorer import Scorer
from trainer.rollout.engine import Engine, check_logprobs, importance_weights
from trainer.rollout.make import make_engine
from trainer.runs.averages import Averages, Timer
from trainer.runs.checkpoint import Checkpoints, TrainState, finished
from trainer.runs.console import progress, say
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog
from trainer.runs.optim import Optimizer
from trainer.runs.profiling import profiled


def run(config, run: RunFolder, resume: bool = False) -> None:
    """Unless it has been done."""
    if resume and finished(run, "ppo", config.ppo.steps):
        say("ppo    is done")
    else:
        train(config, run, resume)


def train(config, run: RunFolder, resume: bool = False) -> None:
    t = Setup.of(config, run)
    say(f"ppo    {t.groups.describe()}")
    with (
        Checkpoints(config, run, "ppo", t.state, resume) as checkpoints,
        MetricsLog(run, ("ppo", "eval"), t.state.step, config.trainer.log) as log,
        progress("ppo", config.ppo.steps, t.state.step, config.trainer.progress) as show,
    ):
        if t.state.step == 0:
            metrics, _ = evaluated(t)
            log.write("eval", 0, metrics, policy=sources.start_name(config))
        while t.state.step < config.ppo.steps:
            with profiled(config, run, "ppo", t.state.step + 1):
                metrics = iteration(t, t.state.step)
            t.state.step += 1
            log.write("ppo", t.state.step, metrics)
            show(headline(metrics))
            last = t.state.step == config.ppo.steps
            if last or (config.eval.every and t.state.step % config.eval.every == 0):
                evaluation, samples = evaluated(t, t.critic, t.groups)
                log.write("eval", t.state.step, evaluation, policy="policy")
                few = few_of_each_domain(samples, config.eval.final_samples)
                log.write_samples("eval", t.state.step, samples if last else few)
                metrics |= evaluation
            checkpoints.after_step(log, metrics, t.guard)
        t.policy.save(run.model("policy"), t.tokenizer)
        checkpoints.end()


def evaluated(t: Setup, *groups: object) -> tuple[dict[str, float], list[dict]]:
    """The policy as it is, by the evaluator; with critic and groups also by group."""
    t.engine.sync(t.policy, t.state.step)
    out = t.evaluator(t.policy, *groups)
    t.engine.rest()
    return out


def iteration(t: Setup, step: int) -> dict[str, float]:
    config, timer = t.config, Timer()
    samples = config.ppo.samples_per_prompt

    with timer("draw"):
        chosen = draw(t, step)
        t.reference_scores.fill(t, step, chosen)
    with timer("sync"):
        t.engine.sync(t.policy, step)
    with timer("rollout"):
        unique = [t.prompts[i] for i in chosen]
        rollout = t.engine.generate(
            [p.ids for p in unique], samples, parallel.generator(config.run.seed, "rollout", step)
        )
        t.engine.rest()
        sequences, mask = rollout.sequences, rollout.sequences.mask
        prompts = [p for p in unique for _ in range(samples)]  # one a sequence

    with timer("score"):
        raw = t.scorer(prompts, sequences, rollout.truncated)

    with timer("forward"):
        forward = forward_models(config, t.policy, t.reference, t.critic, sequences)
        bound, synced = config.rollout.logprob_bound, t.engine.synced
        mismatch = check_logprobs(rollout, forward.logprobs, bound, synced)
        importance, importance_metrics = importance_weights(
            rollout, forward.logprobs, config.ppo.importance, config.ppo.importance_cap
        )
    seen = {"values": forward.values, "group logits": forward.group_logits}
    if not t.guard.allows("rollout", **{f"reward {name}": x for name, x in raw.items()}, **seen):
        skipped = {"objective/scores": mean(raw["total"]), "guard/skipped": t.guard.skipped}
        return skipped | timer.metrics(int(sequences.lengths.sum()))

    with timer("experience"):
        t.normaliser.observe(raw["total"])
        scores = t.normaliser(raw["total"])
        returns = performance(
            config.groups.compared,
            scores,
            raw["total"],
            t.reference_scores.of(chosen, samples),
            t.normaliser.scale,
        )
        if not focused(t, step):
            t.groups.cut(forward.group_logits)
        probs = t.groups.observe(t.groups.probs(forward.group_logits, prompts), returns)
        kl_coef = t.groups.kl_coefs(probs)
        exp = estimate(config, forward, scores, mask, kl_coef, probs, samples)
        if config.groups.returns == "penalised":
            returns = returns - kl_coef * exp.seq_kl
        labels = t.groups.labels(returns)

    batch, updates = Batch(sequences, mask, forward, exp, kl_coef, returns, labels), Averages()
    with timer("critic"):  # stage 1: the policy stands still, critic and head learn
        if t.critic is not None:
            train_critic(t, step, batch, updates)

    with timer("policy"):  # stage 2: the groups stand still, the policy learns
        after = probs
        if t.groups.has_head and t.groups.needs_probs_again:
            after = t.groups.probs(t.group_logits(sequences), prompts)
        weights = t.groups.weights(after, returns)
        if step >= config.ppo.critic_warmup_steps:
            train_policy(t, step, batch, weights.unsqueeze(1) * importance, updates)
    t.groups.control(probs, exp.seq_kl)

    with timer("metrics"):
        metrics = updates.means()
        metrics |= {
            "objective/scores": mean(raw["total"]),
            "objective/rlhf_reward": mean(scores - kl_coef * exp.seq_kl),
            "objective/kl": mean(exp.seq_kl),
            "objective/kl_coef": mean(kl_coef),
            "objective/entropy": token_mean(forward.entropy, mask),
            "rollout/length": mean(sequences.answer_lengths),
            "rollout/truncated": mean(rollout.truncated),
            "rollout/logprob_diff_max": mismatch,
            "perf/sync_bytes": synced.bytes,
            "guard/skipped": t.guard.skipped,
        }
        metrics |= importance_metrics
        metrics |= {f"reward/{name}": mean(part) for name, part in raw.items() if name != "total"}
        if config.ppo.has_critic:
            metrics["value/explained_var"] = explained_variance(forward.values, exp.returns, mask)
        metrics |= t.groups.metrics(after, returns, raw["total"], exp.seq_kl, kl_coef, weights)
        columns = {"score": raw["total"]}
        if t.judge is not None:
            columns["gold"] = t.judge(prompts, sequences)
        metrics |= by_label(columns, [p.domain for p in prompts], "domain")
    return metrics | timer.metrics(int(sequences.lengths.sum()))


def draw(t: Setup, step: int) -> list[int]:
    """Places of this step's prompts: the next ones, or those of a pool that the groups ask for."""
    ppo, groups, seed = t.config.ppo, t.config.groups, t.config.run.seed
    if not focused(t, step):
        return batch_indices(len(t.prompts), ppo.prompts_per_step, step, seed, "ppo")
    size = ppo.prompts_per_step * groups.pool
    pool = batch_indices(len(t.prompts), size, step, seed, "ppo")
    prompts = [t.prompts[i] for i in pool]
    logits = None
    if t.groups.has_head:  # it reads the prompt's last token; what follows does not matter
        end = t.tokenizer.eos_token_id
        logits = t.group_logits(Sequences.of([p.ids for p in prompts], [[end]] * size, end))
    weights = t.groups.drawing_weights(logits, prompts)
    taken = torch.multinomial(
        weights.cpu(), ppo.prompts_per_step, generator=parallel.generator(seed, "draw", step)
    )
    return [pool[i] for i in taken.tolist()]


def focused(t: Setup, step: int) -> bool:
    """Whether the head, once it has learnt something, chooses the prompts."""
    return (
        bool(t.config.groups.focus)
        and t.groups.num > 1
        and step >= t.config.ppo.critic_warmup_steps
    )


@dataclass(frozen=True)
class Batch:
    """An iteration's answers, and what was known of them before any update."""

    sequences: Sequences
    mask: Tensor  # (S, T) bool
    forward: Forward
    experience: gikernels.Experience
    kl_coef: Tensor  # (S) eta_i
    performance: Tensor  # (S) R_i
    labels: Tensor | None  # (S) targets of the head: the exact partition


def train_critic(t: Setup, step: int, batch: Batch, updates: Averages) -> None:
    """Clipped value loss, and beside it the loss of the head that predicts the groups."""
    config, mask, exp = t.config, batch.mask, batch.experience
    t.critic.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "critic", step, epoch):
            part = batch.sequences.rows(chosen)
            denom = mask[chosen].sum()
            head_loss = None
            if t.groups.has_head:
                head_loss = t.groups.head_loss(
                    batch.labels[chosen] if batch.labels is not None else None,
                    batch.performance[chosen],
                    lambda part=part: t.group_logits(part),
                )
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                here = chosen[rows]
                with parallel.autocast(config.model.dtype):
                    values, logits = t.critic(part.rows(rows))
                width = values.shape[1]
                loss, figures = gikernels.value_loss(
                    values,
                    batch.forward.values[here, :width],
                    exp.returns[here, :width],
                    mask[here, :width] & bool(weight),
                    denom=denom,
                    clip=config.ppo.value_clip or None,
                )
                if not config.ppo.has_critic:  # the head alone
                    loss = loss * 0
                updates.add("value", {"loss": loss, "clipfrac": figures["clipfrac"]})
                if head_loss is not None:
                    head = head_loss(logits, rows) * weight
                    updates.add("value", {"head_loss": head})
                    loss = loss + head
                loss.backward()
            norm = t.critic_optimizer.step(step, updates.open["value/loss"])
            updates.add("value", {"grad_norm": norm / parallel.world_size()})
            updates.update("value")
    t.critic.eval()


def train_policy(t: Setup, step: int, batch: Batch, weights: Tensor, updates: Averages) -> None:
    """The clipped surrogate with advantages times `weights` (S, T): c_i, and importance weights.
    Sums over micro-batches and ranks with one global denominator."""
    config, mask, forward = t.config, batch.mask, batch.forward
    advantages = batch.experience.advantages * weights
    t.policy.train()
    for epoch in range(config.ppo.ppo_epochs):
        for chosen in shuffled(t, "policy", step, epoch):
            part = batch.sequences.rows(chosen)
            denom = mask[chosen].sum()
            for rows, weight in part.pieces(config.trainer.tokens_per_microbatch):
                here = chosen[rows]
                with parallel.autocast(config.model.dtype):
                    stats = t.policy(part.rows(rows), config.rollout.temperature)
                width = stats.logprobs.shape[1]
                real = mask[here, :width] & bool(weight)
                loss, figures = gikernels.ppo_loss(
                    stats.logprobs,
                    forward.logprobs[here, :width],
                    advantages[here, :width],
                    real,
                    denom=denom,
                    clip_low=config.ppo.clip_low,
                    clip_high=config.ppo.clip_high,
                    dual_clip=config.ppo.dual_clip or None,
                )
                if config.ppo.entropy_coef:
                    loss = loss - config.ppo.entropy_coef * (stats.entropy * real).sum() / denom
                if config.ppo.kl_in_loss:
                    ref_logprobs = forward.ref_logprobs[here, :width]
                    cost = kl_loss(config, stats.logprobs, ref_logprobs, batch.kl_coef[here], real)
                    loss = loss + cost / denom
                updates.add("policy", {"loss": loss, **figures})
                loss.backward()
            norm = t.policy_optimizer.step(step, updates.open["policy/loss"])
            updates.add("policy", {"grad_norm": norm / parallel.world_size()})
            updates.update("policy")
    t.policy.eval()


def shuffled(t: Setup, name: str, step: int, epoch: int) -> Iterator[Tensor]:
    """The minibatches' rows, another split in each epoch."""
    ppo = t.config.ppo
    generator = parallel.generator(t.config.run.seed, name, step, epoch)
    return minibatches(ppo.sequences_per_step, ppo.minibatches, generator, ppo.samples_per_prompt)


def kl_loss(config, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: Tensor, mask: Tensor):
    """Sum of eta_i * KL_it, differentiable; k3, because k1's gradient is zero in expectation."""
    estimator = "k3" if config.kl.estimator in ("k1", "exact") else config.kl.estimator
    each = torch.arange(len(kl_coef), device=kl_coef.device, dtype=torch.int32)
    cost = gikernels.kl_penalty(logprobs, ref_logprobs, kl_coef, each, estimator=estimator)
    return (cost * mask).sum()


# --- what an iteration works with ---------------------------------------------------------------


@dataclass
class Setup:
    config: object
    tokenizer: object
    prompts: list[Prompt]
    policy: Policy
    reference: Policy
    critic: Critic | None
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    engine: Engine
    scorer: Scorer
    normaliser: Normaliser
    groups: Groups
    evaluator: Evaluator
    judge: Judge | None
    reference_scores: ReferenceScores
    guard: Guard
    state: TrainState

    @staticmethod
    def of(config, run: RunFolder) -> Setup:
        source = sources.policy_source(config, run)
        tokenizer = loading.load_tokenizer(source, config)
        prompts = load_prompts(config, "train", tokenizer)
        policy = loading.load_policy(source, config)
        offload = config.model.offload_reference
        anchor = sources.reference_source(config, run)
        reference = loading.frozen(loading.load_policy(anchor, config, offload))
        reward, reward_tokenizer = loading.load_scoring_model(config, run)
        groups = Groups(config, prompts)
        critic = loading.make_critic(config, run, policy, groups)
        guard = Guard(config.trainer.max_skipped)
        options = {
            "guard": guard,
            "weight_decay": config.ppo.weight_decay,
            "grad_clip": config.ppo.grad_clip,
            "warmup": config.ppo.warmup,
        }
        policy_optimizer = Optimizer(
            [(config.ppo.lr, policy.parameters())], name="policy", **options
        )
        critic_optimizer = None
        if critic is not None:
            critic_optimizer = Optimizer(
                [
                    (
                        config.ppo.critic_lr,
                        [*critic.body.parameters(), *critic.value_head.parameters()],
                    ),
                    (config.groups.head_lr, critic.group_head.parameters()),
                ],
                name="critic",
                **options,
            )
        engine = make_engine(config, tokenizer)
        scorer = Scorer(config, tokenizer, reward, reward_tokenizer)
        normaliser = Normaliser(config)
        reference_scores = ReferenceScores(config, len(prompts))
        state = TrainState(
            {"policy": policy, "critic": critic},
            {"policy": policy_optimizer, "critic": critic_optimizer},
            {
                "normaliser": normaliser,
                "groups": groups,
                "reference_scores": reference_scores,
                "guard": guard,
            },
        )
        return Setup(
            config=config,
            tokenizer=tokenizer,
            prompts=prompts,
            policy=policy.eval(),
            reference=reference,
            critic=critic,
            policy_optimizer=policy_optimizer,
            critic_optimizer=critic_optimizer,
            engine=engine,
            scorer=scorer,
            normaliser=normaliser,
            groups=groups,
            evaluator=Evaluator(config, tokenizer, engine, scorer, reference),
            judge=make_judge(config, config.data.prompts),
            reference_scores=reference_scores,
            guard=guard,
            state=state,
        )

    def group_logits(self, sequences: Sequences) -> Tensor:
        """(S, M) of the head as it is now, without gradients."""
        with parallel.autocast(self.config.model.dtype):
            budget = self.config.trainer.tokens_per_microbatch
            return forward_all(self.critic, sequences, budget)[1]


class ReferenceScores:
    """Raw scores of k answers of the reference policy to each prompt that the run will meet.

    Sampled when a prompt is first met, kept in the checkpoints. Empty where nothing asks for them.
    """

    def __init__(self, config, prompts: int) -> None:
        groups = config.groups
        self.asked = groups.compared in ("over_reference", "quantile")
        shape = (prompts, groups.reference_answers) if self.asked else (0, 0)
        self.scores = torch.full(shape, torch.nan, device=parallel.device())  # (prompts, k)

    def of(self, chosen: list[int], samples: int) -> Tensor | None:  # (S, k)
        return self.scores[chosen].repeat_interleave(samples, 0) if self.asked else None

    def fill(self, t: Setup, step: int, chosen: list[int]) -> None:
        """Sample and score for those of the chosen prompts that have none yet."""
        if not self.asked:
            return
        missing = self.scores[:, 0].isnan().tolist()
        todo = [i for i in dict.fromkeys(chosen) if missing[i]]
        if not todo:
            return
        k, prompts = self.scores.shape[1], [t.prompts[i] for i in todo]
        t.engine.sync(t.reference)
        draws = parallel.generator(t.config.run.seed, "reference", step)
        rollout = t.engine.generate([p.ids for p in prompts], k, draws)
        check_engine(t.config, t.engine, rollout, t.reference, most=64)
        repeated = [p for p in prompts for _ in range(k)]
        scores = t.scorer(repeated, rollout.sequences, rollout.truncated)["total"]
        self.scores[torch.tensor(todo, device=scores.device)] = scores.view(-1, k)

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]


# --- figures --------------------------------------------------------------------------------------


def mean(x: Tensor) -> float:
    return float(x.double().mean())


def token_mean(x: Tensor, mask: Tensor) -> float:
    return float(x[mask].double().mean())


def headline(metrics: dict[str, float]) -> dict[str, float]:
    names = {
        "score": "objective/scores",
        "kl": "objective/kl",
        "worst group": "group/worst",
        "gap": "group/gap",
    }
    return {short: metrics[name] for short, name in names.items() if name in metrics}
