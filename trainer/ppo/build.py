"""What an iteration works with: the actors that move, the signals they follow, and the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trainer.batch.sequences import Sequences, forward_all
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.data.sources import load_prompts
from trainer.models import loading, sources
from trainer.models.backbone import base_of, kept, trained
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.models.roles import Models, ppo_models
from trainer.ppo.asked import Asked
from trainer.ppo.evaluate import Evaluator
from trainer.ppo.groups import Groups
from trainer.ppo.reference_scores import ReferenceScores
from trainer.rewards.judge import Judge, make_judge
from trainer.rewards.normaliser import Normaliser
from trainer.rewards.scorer import Scorer
from trainer.rollout.engine import Engine
from trainer.rollout.make import make_engine
from trainer.runs.faults import Guard
from trainer.runs.folder import RunFolder
from trainer.runs.optim import Optimizer
from trainer.runs.state import TrainState


@dataclass
class Actors:
    """The models, what moves them, and what samples from the policy."""

    policy: Policy
    reference: Policy
    critic: Critic | None
    """None where neither values nor a head that finds groups are asked for."""
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer | None
    engine: Engine

    @staticmethod
    def of(
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        models: Models,
        guard: Guard,
    ) -> Actors:
        policy, critic = models.policy, models.critic
        policy_optimizer = Optimizer.of(
            config.ppo, [(config.ppo.lr, trained(policy).values())], guard, "policy", config.trainer
        )
        critic_optimizer = None
        if critic is not None:
            rates: list[tuple[float, Iterable[nn.Parameter]]]
            named = trained(critic)
            head = [p for name, p in named.items() if name.startswith("group_head.")]
            values = [p for name, p in named.items() if not name.startswith("group_head.")]
            rates = [(config.ppo.critic_lr, values), (config.groups.head_lr, head)]
            critic_optimizer = Optimizer.of(config.ppo, rates, guard, "critic", config.trainer)
        for optimizer in (policy_optimizer, critic_optimizer):
            if optimizer is not None:
                optimizer.materialise()  # vLLM starts with the first sync
        engine = make_engine(config, tokenizer)
        return Actors(policy, models.reference, critic, policy_optimizer, critic_optimizer, engine)


@dataclass
class Signals:
    """What an answer is worth, and whose answers count for how much."""

    scorer: Scorer
    normaliser: Normaliser
    groups: Groups
    reference_scores: ReferenceScores
    asked: Asked
    """What the head said of prompts."""
    judge: Judge | None
    """Gold, for metrics."""


@dataclass
class Setup:
    config: Config
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    actors: Actors
    signals: Signals
    evaluator: Evaluator
    guard: Guard
    state: TrainState

    @staticmethod
    def of(config: Config, run: RunFolder) -> Setup:
        tokenizer = loading.load_tokenizer(sources.policy_source(config, run), config)
        prompts = load_prompts(config, "train", tokenizer)
        guard, groups = Guard(config.trainer.max_skipped), Groups(config, prompts)
        models = ppo_models(config, run, groups.num)
        actors = Actors.of(config, tokenizer, models, guard)
        signals = Signals(
            scorer=Scorer(config, tokenizer, models.reward, models.reward_tokenizer),
            normaliser=Normaliser(config),
            groups=groups,
            reference_scores=ReferenceScores(config, run, prompts),
            asked=Asked(config, prompts, groups.num),
            judge=make_judge(config, config.data.prompts, tokenizer),
        )
        return Setup(
            config=config,
            tokenizer=tokenizer,
            prompts=prompts,
            actors=actors,
            signals=signals,
            evaluator=Evaluator(config, tokenizer, actors.engine, signals.scorer, actors.reference),
            guard=guard,
            state=train_state(actors, signals, guard),
        )

    def group_logits(self, sequences: Sequences) -> Tensor:
        """(S, M) of the critic's head as it is now, without gradients."""
        assert self.actors.critic is not None
        budget = self.config.trainer.tokens_per_microbatch
        return forward_all(self.actors.critic, sequences, budget, (True, False))[1]


def train_state(actors: Actors, signals: Signals, guard: Guard) -> TrainState:
    """All that the future of a run depends on."""
    critic = actors.critic
    return TrainState(
        {"policy": actors.policy, "critic": critic},
        {"policy": actors.policy_optimizer, "critic": actors.critic_optimizer},
        {
            "normaliser": signals.normaliser,
            "groups": signals.groups,
            "reference_scores": signals.reference_scores,
            "asked": signals.asked,
            "guard": guard,
        },
        base=base_of(actors.policy),
        adapters=kept(policy=actors.policy, critic=critic),
    )
