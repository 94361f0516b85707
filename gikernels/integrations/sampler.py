"""Drawing prompts by group in somebody else's trainer: rewards in, next prompts out.

    sampler = GroupSampler(len(prompts), batch=64, rule="variance")
    loader = DataLoader(prompts, batch_size=64, sampler=sampler)
    for rows, batch in loader:
        rewards = ...                      # of all ranks, one an answer
        sampler.observe(rows, rewards)     # a prompt's row once for each of its answers

Nothing here communicates: ranks that observe the same draw the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

import gikernels
from gikernels.backends import checks
from gikernels.groups.draw import GroupDraw, Rule
from gikernels.integrations.invariance import separable

Head = Callable[[list[int]], Tensor]
"""Rows of prompts -> (k, M) how likely each is to be of each group."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """By which rule prompts are drawn: of a `GroupSampler`, a TRL trainer or a run of verl."""

    rule: Rule = "even"
    """even, variance, gdro, progress, signal, bandit or none: see `gikernels.GroupDraw`."""
    num_groups: int = 4
    """How many groups are inferred; groups that are given number themselves."""
    memory: float = 0.5
    """Share of a prompt's running reward that stays when its answers are scored again."""
    min_size: int = 1
    """Least number of prompts in an inferred group."""
    pool: int = 8
    """A head is asked about so many times the prompts that are then drawn."""
    beta: float = 1.0
    """Strength of rule variance."""
    rate: float = 0.05
    """Step of rules gdro and progress."""
    floor: float = 0.02
    """Least rate of a group; with rule signal, least weight of a prompt."""
    group_memory: float = 0.9
    """Share of a group's running statistics that stays from one observation to the next."""

    def __post_init__(self) -> None:
        checks.whole("num_groups", self.num_groups, at_least=1)
        checks.number("memory", self.memory, at_least=0, below=1)
        checks.whole("min_size", self.min_size, at_least=1)
        checks.whole("pool", self.pool, at_least=1)
        self.group_draw(self.num_groups)  # checks the rest

    def group_draw(self, num_groups: int) -> GroupDraw:
        return GroupDraw(
            self.rule,
            num_groups,
            beta=self.beta,
            rate=self.rate,
            floor=self.floor,
            memory=self.group_memory,
        )


class GroupSampler(Sampler[int]):
    """Rows of a data set of `size` prompts, `batch` different ones after another, as `rule` asks.

    groups  None: the exact partition of the prompts' running mean rewards, once these fall into
            `num_groups`. A sequence: the group of each prompt, by any name. A function: a head.

    A prompt that was never scored counts as an average one. An epoch has as many draws as there are
    prompts, less an incomplete batch. The next batch depends on the state and its place alone.
    """

    TENSORS = ("count", "mean", "square", "total")

    def __init__(
        self,
        size: int,
        batch: int,
        *,
        groups: Sequence[Hashable] | Head | None = None,
        seed: int = 0,
        **settings: Any,  # those of Drawing
    ) -> None:
        self.size = checks.whole("size", size, at_least=1)
        self.batch = checks.whole("batch", batch, at_least=1)
        if batch > size:
            raise ValueError(f"batch: got {batch} different prompts of {size}")
        self.seed = checks.whole("seed", seed, at_least=0)
        unknown = settings.keys() - {field.name for field in fields(Drawing)}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: not a setting of GroupSampler")
        self.drawing = Drawing(**settings)
        self.head = groups if callable(groups) else None
        self.fixed = None if groups is None or callable(groups) else _numbered(groups, size)
        num_groups = self.drawing.num_groups if self.fixed is None else int(self.fixed.max()) + 1
        self.draw = self.drawing.group_draw(num_groups)

        self.count = torch.zeros(size, dtype=torch.long)  # answers scored
        self.mean = torch.zeros(size, dtype=torch.float64)  # a running mean of their rewards
        self.square = torch.zeros(size, dtype=torch.float64)  # and of their squares
        self.total = torch.zeros(3, dtype=torch.float64)  # of all rewards: n, mean, n * variance
        self.ids = self.fixed  # (size) the groups, -1 where unknown; None while nothing is

        self.epoch = 0
        self.drawn: list[int] = []  # of this epoch; a loader may be ahead of who trains
        self.yielded = 0
        self.started = False  # the next iterator opens the next epoch
        self.start = 0  # where the first iterator after loading a state begins

    # --- next prompts out -----------------------------------------------------------------------

    def __len__(self) -> int:
        return self.size - self.size % self.batch

    def __iter__(self) -> Iterator[int]:
        if self.started:
            self.epoch, self.drawn = self.epoch + 1, []
        start, self.start, self.started = self.start, 0, True
        for place in range(start, len(self)):
            if place >= len(self.drawn):
                self.drawn += self._batch()
            self.yielded = place + 1
            yield self.drawn[place]
        self.yielded = len(self) + 1  # somebody saw the end

    def _batch(self) -> list[int]:
        place = repr((self.seed, self.epoch, len(self.drawn))).encode()
        seed = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        if self.head is None:
            return take(self.weights(), self.batch, generator).tolist()
        asked = min(self.drawing.pool * self.batch, self.size)
        pool = torch.randperm(self.size, generator=generator)[:asked]
        weights = self.draw.weights(self._ask(pool))
        return pool[take(weights, self.batch, generator)].tolist()

    def weights(self) -> Tensor:
        """(size) float64: how likely each prompt is to be taken, 1 for an average one."""
        known = self.known
        weights = torch.ones(self.size, dtype=torch.float64)
        if self.drawing.rule == "signal" and self.head is None:
            spread = (self.square - self.mean.square()).clamp(min=0).sqrt()[known]
            if bool(spread.sum() > 0):
                floor = self.drawing.floor  # what is sure now need not stay so
                weights[known] = spread / spread.mean() * (1 - floor) + floor
        elif self.ids is not None:
            weights[known] = self.draw.weights(self._one_hot(self.ids[known]))
        return weights

    @property
    def known(self) -> Tensor:
        """(size) bool: prompts of which the rule knows something. One answer has no spread."""
        if self.drawing.rule == "signal":
            return self.count > 1
        return torch.ones(self.size, dtype=torch.bool) if self.fixed is not None else self.count > 0

    # --- rewards in -----------------------------------------------------------------------------

    def observe(
        self,
        rows: Tensor | Sequence[int],  # (S) each answer's prompt
        rewards: Tensor | Sequence[float],  # (S) comparable across prompts; NaN: was not scored
        advantages: Tensor | Sequence[float] | None = None,  # (S) for rule bandit; else its own
    ) -> None:
        """What the answers of a step scored, those of ALL ranks in the same order on each.

        `advantages` left out are rewards less the mean of the prompt's answers, in standard
        deviations of all rewards."""
        rows, rewards = self._checked(rows, rewards)
        scored = ~rewards.isnan()
        rows, rewards = rows[scored], rewards[scored]
        if advantages is not None:
            advantages = torch.as_tensor(advantages).detach().double().cpu()
            checks.shape("advantages", advantages, tuple(scored.shape), "that of rows")
            advantages = advantages[scored]
        if not len(rows):
            return
        own = self._remember(rows, rewards)
        n, _, spread = self.total.tolist()
        std = (spread / n) ** 0.5
        if std == 0:
            return  # no unit to measure groups in
        probs = self._groups_of(rows)
        if probs is not None:
            self.draw.observe(probs, rewards / std, own / std if advantages is None else advantages)

    def _checked(self, rows: Any, rewards: Any) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(rows).detach().cpu()
        if rows.numel():
            checks.ints("rows", rows)
        rows = rows.long()
        rewards = torch.as_tensor(rewards).detach().double().cpu()
        checks.dims("rows", rows, 1, "one an answer")
        checks.shape("rewards", rewards, tuple(rows.shape), "that of rows")
        if bool(rewards.isinf().any()):
            raise ValueError("rewards: got an infinite one, want finite ones, or NaN for none")
        checks.ids_within("rows", rows, self.size)
        return rows, rewards

    def _remember(self, rows: Tensor, rewards: Tensor) -> Tensor:
        """Into the running moments; (S) rewards less the mean of the same prompt's in this step."""
        prompts, prompt, count = rows.unique(return_inverse=True, return_counts=True)
        means, squares = (
            torch.zeros(len(prompts), dtype=torch.float64).index_add(0, prompt, x) / count
            for x in (rewards, rewards.square())
        )
        keep = torch.where(self.count[prompts] > 0, self.drawing.memory, 0.0)
        self.mean[prompts] = keep * self.mean[prompts] + (1 - keep) * means
        self.square[prompts] = keep * self.square[prompts] + (1 - keep) * squares
        self.count[prompts] += count
        before, new = self.total[0].clone(), float(len(rewards))
        apart = rewards.mean() - self.total[1]
        self.total[0] += new
        self.total[1] += apart * new / self.total[0]
        inside = (rewards - rewards.mean()).square().sum()
        self.total[2] += inside + apart.square() * before * new / self.total[0]
        return rewards - means[prompt]

    def _groups_of(self, rows: Tensor) -> Tensor | None:  # -> (S, M)
        if self.head is not None:
            prompts, prompt = rows.unique(return_inverse=True)
            return self._ask(prompts)[prompt]
        if self.fixed is None:
            self._partition()
        return None if self.ids is None else self._one_hot(self.ids[rows])

    def _partition(self) -> None:
        """Groups of the prompts scored so far, where there are so many different ones."""
        known, num, least = self.count > 0, self.draw.num, self.drawing.min_size
        values = self.mean[known]
        if not separable(values, num, least):
            self.ids = None
            return
        self.ids = torch.full((self.size,), -1)
        self.ids[known] = gikernels.partition(values, num, min_size=least).group_ids.long()

    def _ask(self, rows: Tensor) -> Tensor:
        assert self.head is not None
        probs = checks.floats("groups(rows)", self.head(rows.tolist())).detach().double().cpu()
        want = (len(rows), self.draw.num)
        checks.shape("groups(rows)", probs, want, "a row of probabilities a prompt")
        sums = (probs.sum(1) - 1).abs() < 1e-2  # bf16 is off by so much
        if not bool((probs >= 0).all() and sums.all()):
            raise ValueError("groups(rows): want rows of probabilities that sum to 1")
        return probs

    def _one_hot(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, self.draw.num).double()

    def metrics(self) -> dict[str, float]:
        """draw/...: what share of the prompts was scored; each group's share of those and rate."""
        metrics = {"draw/scored": float((self.count > 0).double().mean())}
        if self.ids is not None:
            share = self._one_hot(self.ids[self.ids >= 0]).mean(0)
            for g, (f, q) in enumerate(zip(share.tolist(), self.draw.rates(share).tolist())):
                metrics |= {f"draw/{g}/share": f, f"draw/{g}/rate": q}
        return metrics

    # --- states ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Of tensors and numbers: `torch.load` reads it with weights_only=True."""
        return {
            **{name: getattr(self, name).clone() for name in self.TENSORS},
            "draw": {name: x.clone() for name, x in self.draw.state_dict().items()},
            "epoch": self.epoch,
            "drawn": torch.tensor(self.drawn, dtype=torch.long),
            "yielded": self.yielded,
        }

    def load_state_dict(self, state: dict[str, Any], rewind: bool = False) -> None:
        """The next iterator goes on where the state was saved. With `rewind` it starts the epoch
        again and yields the same prompts up to there, for trainers that skip what they had."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state: has no {', '.join(sorted(missing))}")
        if len(state["count"]) != self.size:
            raise ValueError(f"state: of {len(state['count'])} prompts, want {self.size}")
        if len(state["draw"]["mean"]) != self.draw.num:
            raise ValueError(f"state: of {len(state['draw']['mean'])} groups, want {self.draw.num}")
        for name in self.TENSORS:
            setattr(self, name, state[name].clone())
        self.draw.load_state_dict({name: x.clone() for name, x in state["draw"].items()})
        self.epoch, self.drawn = state["epoch"], state["drawn"].tolist()
        self.yielded = state["yielded"]
        self.started = self.yielded > len(self)  # that epoch is over
        self.start = 0 if rewind or self.started else self.yielded
        if self.fixed is None and self.head is None:
            self._partition()


def take(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count) different ones of n, each with probability count * weight / sum of weights exactly.

    Systematic sampling: the ones lie along a line in random order, each as long as it is likely,
    and every step of length 1 from a random start takes one. Taking one after another without
    putting back (multinomial) would favour the light ones where `count` is not small beside n. One
    that is longer than a step is taken for sure, and the others share what is left."""
    chance = weights.clamp(min=1e-9)  # nothing weighs nothing where all else has been taken
    sure = torch.zeros(len(chance), dtype=torch.bool)
    while True:
        left = count - int(sure.sum())
        chance = torch.where(sure, 0, chance * (left / chance[~sure].sum().clamp(min=1e-300)))
        whole = chance > 1 - 1e-12
        if left == 0 or not bool(whole.any()):
            break
        sure |= whole
    order = torch.randperm(len(chance), generator=generator)
    start = torch.rand((), dtype=torch.float64, generator=generator)
    ends = chance[order].cumsum(0)
    places = torch.searchsorted(ends, start + torch.arange(left), right=True)
    taken = order[places.clamp(max=len(order) - 1)]
    taken = torch.cat([sure.nonzero().flatten(), taken])
    return taken[torch.randperm(len(taken), generator=generator)]


class Repeated(Sampler[int]):
    """Each batch of a sampler `times` times over, each prompt of it `each` times in a row, as
    trainers want it that score several answers to a prompt, and train on them several times."""

    def __init__(self, sampler: GroupSampler, each: int, times: int) -> None:
        self.sampler, self.each, self.times = sampler, each, times

    def __len__(self) -> int:
        return len(self.sampler) * self.each * self.times

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for row in self.sampler:
            batch.append(row)
            if len(batch) == self.sampler.batch:
                for _ in range(self.times):
                    yield from (row for row in batch for _ in range(self.each))
                batch = []


def _numbered(groups: Sequence[Hashable], size: int) -> Tensor:
    """Groups by any name as 0, 1, ... in the order in which they are met."""
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != size:
        raise ValueError(f"groups: got {len(names)}, want one for each of {size} prompts")
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
