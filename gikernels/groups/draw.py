"""Which prompts to answer next: every objective over groups as a rate of drawing (docs/math.md).

    E_f[c_g A grad log pi] = Z E_q[A grad log pi]    with q_g = f_g c_g / Z

So a weight c_g on the advantages of group g, whose prompts are a share f_g of the data, has the
same mean gradient as meeting the group at rate q_g, and more noise: it scales the few answers that
a rare group has, where drawing gives it more of them. A rule is a function that returns q;
`GroupDraw` keeps what rules look at. n prompts or sequences, M groups, group 0 the hardest.

    draw = GroupDraw("variance", num_groups=4)
    rates = draw.rates(share)                         # q (M)
    weights = draw.weights(probs)                     # (n): how likely each prompt is to be taken
    draw.observe(probs, returns, advantages)          # what came of those that were
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["even", "variance", "gdro", "progress", "signal", "bandit", "none"]
RULES: tuple[str, ...] = get_args(Rule)
SLOWER = 5
"""Progress is a running mean less one whose memory is so many times as long."""


def even(share: Tensor) -> Tensor:  # (M) -> (M)
    """Every group that there is as often as any other."""
    there = (share > 0).to(share.dtype)
    return there / there.sum()


def variance(share: Tensor, returns: Tensor, beta: float) -> Tensor:  # (M), (M) -> (M)
    """The gradient of E[R] - beta Var(R) over groups: c_g = 1 - beta (dVar / dR_g) / f_g with
    Var = sum_g f_g (R_g - R)^2, hence 1 - 2 beta (R_g - R). Never below 0: nothing is unlearnt."""
    mean = (share * returns).sum() / share.sum()
    return _normalised(share * (1 - 2 * beta * (returns - mean)).clamp(min=0))


def descend(rates: Tensor, loss: Tensor, rate: float) -> Tensor:  # (M), (M) -> (M)
    """A step of exponentiated gradient towards the groups of larger loss."""
    return _normalised(rates * torch.exp(rate * (loss - loss.max())))


def proportional(share: Tensor, worth: Tensor) -> Tensor:  # (M), (M) -> (M)
    """As much of each group as there is to learn from one of its answers; evenly where that is
    nothing for all."""
    return _normalised(torch.where(share > 0, worth, 0)) if bool(worth.sum() > 0) else even(share)


def at_least(floor: float, rates: Tensor, share: Tensor) -> Tensor:  # (M), (M) -> (M)
    """The same with `floor` for each group that there is: what is never met is never seen to have
    changed. Groups above it give what those below lack, in proportion."""
    there = share > 0
    floor = min(floor, 1 / max(int(there.sum()), 1))
    rates = _normalised(torch.where(there, rates, 0))
    low = there & (rates < floor)
    for _ in range(len(rates)):  # giving may bring another one down
        left = 1 - floor * low.sum()
        high = torch.where(there & ~low, rates, 0)
        rates = torch.where(low, floor, high * (left / high.sum().clamp(min=1e-30)))
        more = there & (rates < floor * (1 - 1e-6))
        if not bool(more.any()):
            break
        low = low | more
    return rates


def predicted_std(beliefs: Tensor, means: Tensor, squares: Tensor) -> Tensor:  # (n, M) -> (n)
    """Standard deviation of what an answer to each prompt returns, by which groups it is believed
    to fall into and what those return. Of 0 and 1 it is sqrt(p (1 - p))."""
    mean = beliefs @ means
    return (beliefs @ squares - mean.square()).clamp(min=0).sqrt()


class GroupDraw:
    """How often each group, or prompt, is to be drawn, by one rule.

    even      every group equally often
    variance  as the gradient of the mean less `beta` times the variance between groups asks
    gdro      Group-DRO's adversary: q_g <- q_g exp(-rate R_g)
    progress  the same with what R_g has gained of late in place of R_g
    bandit    by the running mean of |advantage|
    signal    prompt by prompt: by the predicted standard deviation of its answers' returns
    none      as they come
    """

    TENSORS = ("mean", "slow", "centre", "square", "gain", "rate_of")

    def __init__(
        self,
        rule: Rule,
        num_groups: int,
        *,
        beta: float = 1.0,
        rate: float = 0.05,
        floor: float = 0.02,
        memory: float = 0.9,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(rule, num_groups, beta, rate, floor, memory)
        self.rule, self.num = rule, num_groups
        self.beta, self.step, self.floor, self.memory = beta, rate, floor, memory
        unknown = torch.full((num_groups,), torch.nan, dtype=torch.float64, device=device)
        self.mean = unknown.clone()  # R_g, a running mean
        self.slow = unknown.clone()  # R_g, of a longer time
        self.centre, self.square = (
            unknown.clone(),
            unknown.clone(),
        )  # of what is believed, for signal
        self.gain = unknown.clone()  # |A| of an answer
        self.rate_of = torch.full_like(unknown, 1 / num_groups)  # q of gdro and progress

    def observe(
        self,
        probs: Tensor,  # (n, M) p_ig
        returns: Tensor,  # (n) R_i, on a scale where 1 is a standard deviation
        advantages: Tensor | None = None,  # (n), for bandit
        beliefs: Tensor
        | None = None,  # (n, M) the groups that a head learns to predict, else probs
    ) -> None:
        """What the answers of a step returned."""
        probs, returns = probs.double(), returns.double()
        now = _means(probs, returns)
        self.mean = self._moved(self.mean, now, self.memory)
        self.slow = self._moved(self.slow, now, 1 - (1 - self.memory) / SLOWER)
        believed = probs if beliefs is None else beliefs.double()
        self.centre = self._moved(self.centre, _means(believed, returns), self.memory)
        self.square = self._moved(self.square, _means(believed, returns.square()), self.memory)
        if advantages is not None:
            self.gain = self._moved(
                self.gain, _means(probs, advantages.double().abs()), self.memory
            )
        if self.rule in ("gdro", "progress"):
            loss = -self.mean if self.rule == "gdro" else self.slow - self.mean
            known = loss.nan_to_num(float(loss[~loss.isnan()].mean()))  # one was met: (n) is not 0
            self.rate_of = at_least(
                self.floor, descend(self.rate_of, known, self.step), torch.ones_like(known)
            )

    @staticmethod
    def _moved(old: Tensor, new: Tensor, memory: float) -> Tensor:
        """A group that was not met, whose mean is nan, stays as it was."""
        mixed = torch.where(old.isnan(), new, memory * old + (1 - memory) * new)
        return torch.where(new.isnan(), old, mixed)

    def rates(self, share: Tensor) -> Tensor:  # (M) -> (M) float64
        """q_g, given each group's share f_g of the prompts to choose from. Evenly, while nothing is
        known of any group; one of which nothing is known counts as an average one."""
        share = share.double()
        if self.rule == "none":
            return _normalised(share)
        if self.rule in ("gdro", "progress"):
            return at_least(self.floor, self.rate_of, share)
        known = self.gain if self.rule == "bandit" else self.mean
        if self.rule in ("even", "signal") or bool(known.isnan().all()):
            return even(share)
        filled = known.nan_to_num(float(known[~known.isnan()].mean()))
        if self.rule == "variance":
            rates = variance(share, filled, self.beta)
        else:
            rates = proportional(share, filled)
        return at_least(self.floor, rates, share)

    def weights(
        self,
        probs: Tensor,  # (n, M) of the prompts to choose from
        beliefs: Tensor | None = None,  # (n, M) what a head says of them, else probs
    ) -> Tensor:
        """(n) float64: how likely each prompt is to be taken, with mean 1: those of a group
        equally, and together at the group's rate; with signal each by its own prediction."""
        probs = probs.double()
        share = probs.mean(0)
        if self.rule == "signal" and not bool(self.centre.isnan().all()):
            centre, square = (
                each.nan_to_num(float(each[~each.isnan()].mean()))
                for each in (self.centre, self.square)
            )
            believed = probs if beliefs is None else beliefs.double()
            worth = predicted_std(believed, centre, square)
            if bool(worth.sum() > 0):
                # A floor here as well: what is sure now need not stay so.
                worth = worth / worth.mean()
                return worth * (1 - self.floor) + self.floor
        return probs @ torch.where(share > 0, self.rates(share) / share.clamp(min=1e-300), 0)

    def reorder(self, moved: Tensor) -> None:
        """Group g is from now on what was group moved[g]."""
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[moved])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.TENSORS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.TENSORS:
            setattr(self, name, state[name])


def _normalised(rates: Tensor) -> Tensor:
    return rates / rates.sum()


def _means(probs: Tensor, values: Tensor) -> Tensor:  # (n, M), (n) -> (M), nan where nobody is
    mass = probs.sum(0)
    means = (probs * values.unsqueeze(1)).sum(0) / mass
    return torch.where(mass > 0, means, torch.nan)


def _check(
    rule: str, num_groups: int, beta: float, rate: float, floor: float, memory: float
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}; want one of {', '.join(RULES)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"num_groups: got {num_groups!r}; want an integer of 1 or more")
    for name, value in (("beta", beta), ("rate", rate)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: got {value!r}; want a finite number of 0 or more")
    for name, value in (("floor", floor), ("memory", memory)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value!r}; want a number from 0 to below 1")
