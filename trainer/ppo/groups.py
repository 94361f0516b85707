"""Group-invariant learning: which sequences are hard, and what that changes (docs/math.md).

    groups.drawing_weights(logits, prompts)         which prompts of a pool the step is to take
    probs = groups.probs(head's logits, prompts)    p_ig, group 0 the hardest, M - 1 the easiest
    groups.kl_coefs(probs)                          eta_i: relaxed where it is hard
    groups.head_loss(...)                           stage 1: the head learns to predict the groups
    groups.weights(probs, performance)              stage 2: c_i, the weight of a policy gradient

Three sources of groups share this interface. The head on the critic: trained on the exact partition
of the performance (`exact`), or by ascent on the variance (`adversarial`). Labels that are fixed:
the data's domains (`oracle`) or a hash of the prompt (`random`). And one group for all (`none`),
with which every formula below becomes plain PPO. S sequences, M groups.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import gikernels
from trainer import parallel
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.config.policy import Kl
from trainer.data.errors import DataError


class Groups:
    def __init__(self, config: Config, prompts: Sequence[Prompt]) -> None:
        self.config, self.kl = config.groups, config.kl
        self.seed = config.run.seed
        self.inference = config.groups.inference
        self.domains: Sequence[str] = ()
        self.num = config.groups.num_groups
        if self.inference == "none":
            self.num = 1
        if self.inference == "oracle":
            missing = next((p for p in prompts if p.domain is None), None)
            if missing is not None:
                raise DataError(
                    "groups.inference=oracle: the prompts need a domain column "
                    f"(data.columns.domain); {missing.text[:40]!r} has none"
                )
            self.domains = sorted({p.domain for p in prompts if p.domain is not None})
            self.num = len(self.domains)
        device = parallel.device()
        # Slots are the head's outputs (or the domains) in their own order; order[g] is the slot of
        # the g-th hardest group. A head trained on the exact partition is in order by itself.
        self.order = torch.arange(self.num, device=device)
        self.running = torch.full((self.num,), torch.nan, device=device)  # R of each slot
        self.swaps = 0
        # assign=hard: where the head's ranking of sequences is cut into groups.
        self.cuts = torch.arange(1, self.num, device=device) - 0.5
        self.share: Tensor | None = None  # (M) of the pool that prompts were last drawn from
        self.dro = torch.full((self.num,), 1 / self.num, device=device)
        chosen = self.config
        self.draw = gikernels.GroupDraw(
            chosen.draw if chosen.draw != "dynamic" else "none",
            self.num,
            beta=chosen.draw_beta,
            rate=chosen.draw_rate,
            floor=chosen.draw_floor,
            memory=chosen.ema,
            device=device,
        )
        self.coefs = coefficients(self.kl, self.num).to(device)  # eta_g

    @property
    def has_head(self) -> bool:
        return self.config.has_head

    @property
    def needs_probs_again(self) -> bool:
        """Whether the policy's weights look at the head, which stage 1 has just moved."""
        by_group = {"variance": self.config.beta > 0, "group_dro": True}
        return by_group.get(self.config.objective, False)

    def describe(self) -> str:
        """One line that says which method is in force."""
        kl = f"KL coefficient {self.kl.coef:g}"
        if self.num == 1:
            return f"plain PPO, {kl}"
        config = self.config
        parts = [f"{self.num} groups, inference {config.inference}"]
        if self.has_head:
            parts[-1] += f", {config.assign}"
        answers = ""
        if config.performance in ("over_reference", "quantile"):
            answers = f" ({config.reference_answers} reference answers a prompt)"
        parts.append(f"performance {config.performance}{answers}")
        if config.choose:
            part = "" if config.focus == 1 else f" (focus {config.focus:g})"
            parts.append(f"prompts drawn by the rule {config.draw}{part}")
        if config.objective != "variance":
            parts.append(f"objective {config.objective}")
        elif config.beta:
            parts.append(f"weights by the variance (beta {config.beta:g})")
        if self.kl.adaptive:
            low = f"{self.kl.coef * self.kl.floor:g}"
            how = "step by step to" if self.kl.shape == "graded" else "to"
            kl += f", relaxed {how} {low} on hard sequences"
        return ", ".join([*parts, kl])

    # --- who belongs where ---

    def probs(self, logits: Tensor | None, prompts: Iterable[Prompt]) -> Tensor:
        """(S, M): p_ig, hardest group first. `logits` are the head's, `prompts` one a sequence."""
        if self.has_head:
            assert logits is not None
            probs = logits.softmax(-1)[:, self.order]
            if self.config.assign == "soft":
                return probs
            return F.one_hot(torch.bucketize(self._rank(probs), self.cuts), self.num).float()
        slots = [self._slot(prompt) for prompt in prompts]
        return F.one_hot(torch.tensor(slots, device=self.order.device), self.num).float()[
            :, self.order
        ]

    def cut(self, logits: Tensor | None) -> None:
        """Take the groups' borders from these sequences: an unselected sample of the prompts.

        The head is trained on labels that depend on the luck of one answer, so its probabilities
        stay far from 0 and 1 and the means of soft groups close to each other. The order in which
        it puts sequences is good: the exact partition of it gives groups whose means differ.
        """
        if self.config.assign == "soft" or not self.has_head:
            return
        assert logits is not None
        rank = self._rank(logits.softmax(-1)[:, self.order])
        if len(rank.unique()) >= self.num:  # else the head says the same of all: the cuts stay
            self.cuts = gikernels.partition(rank, self.num).thresholds.to(rank.dtype)

    @staticmethod
    def _rank(probs: Tensor) -> Tensor:  # (S, M) -> (S): the expected group
        return probs @ torch.arange(probs.shape[1], device=probs.device, dtype=probs.dtype)

    def drawing_weights(self, logits: Tensor | None, prompts: Iterable[Prompt]) -> Tensor:
        """(n): how likely each prompt of a pool is to be taken, up to a common factor.

        A weight of a policy gradient has the same mean, but leaves the hard group with its few
        noisy answers; this gives it more of them.
        """
        self.cut(logits)
        probs = self.probs(logits, prompts)
        self.share = probs.mean(0)
        believed = None if logits is None else logits.softmax(-1)[:, self.order]
        focus = self.config.focus
        return (1 - focus + focus * self.draw.weights(probs, believed)).float()

    def learn(
        self,
        probs: Tensor,  # (S, M)
        performance: Tensor,  # (S)
        labels: Tensor | None,  # (S) what the head learns to predict
        advantages: Tensor,  # (S) mean |A| of each answer
    ) -> None:
        """What this step's answers say of the groups, for the steps to come."""
        believed = None
        if self.inference == "exact" and self.num > 1:
            believed = torch.zeros_like(probs)  # nobody anywhere: nothing is learnt of beliefs
            if labels is not None:
                believed = F.one_hot(labels, self.num)
        self.draw.observe(probs, performance, advantages, believed)

    def _slot(self, prompt: Prompt) -> int:
        if self.inference == "oracle":
            return self.domains.index(prompt.domain)
        if self.inference == "random":  # the same prompt always in the same group
            return zlib.crc32(repr((self.seed, prompt.ids)).encode()) % self.num
        return 0

    def observe(self, probs: Tensor, performance: Tensor) -> Tensor:
        """Keep the order of soft or given groups by a running mean of their returns; the
        probabilities in that order, which is theirs until it changes.

        One batch's means cross by chance; their running mean crosses when the groups do.
        """
        if self.inference in ("exact", "none"):
            return probs
        means = torch.empty_like(self.running)
        means[self.order] = group_means(probs, performance)
        fresh = self.running.isnan()
        self.running = torch.where(
            fresh, means, self.config.ema * self.running + (1 - self.config.ema) * means
        )
        order = self.running.argsort(stable=True)
        if not bool(fresh.any()) and not torch.equal(order, self.order):
            self.swaps += 1
        place = torch.empty_like(order)  # of each slot, so far
        place[self.order] = torch.arange(self.num, device=order.device)
        moved = place[order]
        self.order, self.dro = order, self.dro[moved]
        self.draw.reorder(moved)
        return probs[:, moved]

    # --- stage 1: the head ---

    def labels(self, performance: Tensor) -> Tensor | None:
        """(S) targets of the head: the exact partition of the performance, or None.

        None where there is nothing to predict: fewer distinct values than groups, as happens when
        every answer of a batch beats every reference answer.
        """
        if self.inference != "exact":
            return None
        if len(performance.unique()) < self.num:
            return None
        try:
            min_size = self.config.min_size
            return gikernels.partition(performance, self.num, min_size=min_size).group_ids.long()
        except ValueError:  # ties leave no cut with min_size on each side
            return None

    def head_loss(
        self, labels: Tensor | None, performance: Tensor, logits_now: Callable[[], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """loss(logits (s, M), rows (s)) of a micro-batch; adds up over those of a minibatch.

        `labels` and `performance` are the minibatch's. `logits_now()` gives the head's logits for
        all of it: Var(phi) is no sum over sequences, so its gradient with respect to the logits is
        taken for the whole minibatch first, and each micro-batch pulls its own logits along it.
        """
        if self.inference == "exact":
            if labels is None:
                return lambda logits, rows: logits.sum() * 0
            # Weighted to balance the masses: else a rare hard group is never predicted.
            counts = torch.bincount(labels, minlength=self.num).float()
            weight = counts.sum() / (self.num * counts.clamp(min=1))
            share = self.config.critic_beta / counts.sum()

            def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
                return share * F.cross_entropy(logits, labels[rows], weight, reduction="sum")

            return cross_entropy

        logits = logits_now().detach().requires_grad_()
        with torch.enable_grad():
            soft = gikernels.soft_groups(logits, performance, form=self.config.form)
            entropy = -(soft.mass * soft.mass.clamp(min=1e-12).log()).sum()
            loss = -soft.variance + self.config.balance * (math.log(self.num) - entropy)
            (pull,) = torch.autograd.grad(self.config.critic_beta * loss, logits)
        return lambda logits, rows: (logits * pull[rows]).sum()

    # --- stage 2: the policy ---

    def weights(self, probs: Tensor, performance: Tensor) -> Tensor:
        """c_i (S), by which the policy's advantages are multiplied."""
        config = self.config
        low, high = config.clamp
        if config.objective == "cvar":
            worst = max(1, math.ceil(config.cvar_alpha * len(performance)))
            bound = performance.sort().values[worst - 1]
            return (performance <= bound).float() / config.cvar_alpha
        if config.objective == "sequence_variance":
            # M = S, each sequence its own group of mass 1 / S: both forms give this.
            from_mean = performance - performance.mean()
            return (1 - 2 * config.beta * from_mean).clamp(low, high)
        if config.objective == "group_dro":
            self.dro = self.dro * torch.exp(-config.dro_lr * group_means(probs, performance))
            self.dro = self.dro / self.dro.sum()
            return (self.num * probs @ self.dro).clamp(low, high)
        if config.beta == 0 or self.num == 1:  # exactly 1, and not 1 up to rounding
            return torch.ones_like(performance)
        return gikernels.group_weights(
            probs, performance, config.beta, form=config.form, clamp=(low, high)
        )

    # --- adaptive KL ---

    def kl_coefs(self, probs: Tensor) -> Tensor:
        """eta_i (S) = eta (kappa + (1 - kappa) p_i,high), or what the controllers made of it."""
        if not self.kl.controller and (not self.kl.adaptive or self.num == 1):
            return torch.full_like(probs[:, 0], self.kl.coef)
        return probs @ self.coefs

    def control(self, probs: Tensor, seq_kl: Tensor) -> None:
        """eta_g <- eta_g (1 + rate clip(KL_g / target_g - 1, -0.2, 0.2)), where it is asked for."""
        if not self.kl.controller:
            return
        target = torch.tensor(self.kl.target, device=seq_kl.device)
        error = (group_means(probs, seq_kl) / target - 1).clamp(-0.2, 0.2)
        self.coefs = self.coefs * (1 + self.kl.controller_rate * error)

    # --- what is logged, and kept ---

    def metrics(
        self,
        probs: Tensor,
        performance: Tensor,
        scores: Tensor,
        seq_kl: Tensor,
        kl_coef: Tensor,
        weights: Tensor,
    ) -> dict[str, float]:
        """`score` is the raw score, `performance` the R_g the method sees; the gap is of R_g.
        `share` is a group's part of the prompts as they come, `mass` of those that were taken, and
        `rate` what the rule asks for next."""
        mass = group_means(probs.new_ones(len(probs), 1), probs)
        share = mass if self.share is None else self.share
        columns = {
            "score": group_means(probs, scores),
            "performance": group_means(probs, performance),
            "kl": group_means(probs, seq_kl),
            "kl_coef": group_means(probs, kl_coef),
            "mass": mass,
            "share": share,
            "rate": self.draw.rates(share) if self.config.choose else share,
            "weight": group_means(probs, weights),
        }
        out = {
            f"group/{g}/{name}": float(column[g])
            for g in range(self.num)
            for name, column in columns.items()
        }
        returns = columns["performance"]
        low, high = self.config.clamp
        clamped = ((weights <= low) | (weights >= high)).float()
        return {
            **out,
            "group/gap": float(returns[-1] - returns[0]),
            "group/variance": float((mass * (returns - mass @ returns).square()).sum()),
            "group/worst": float(columns["score"].min()),
            "group/label_swaps": self.swaps,
            "group/weight_clamped": float(clamped.mean()),
        }

    def state_dict(self) -> dict:
        names = ("order", "running", "dro", "coefs", "cuts")
        kept = {name: getattr(self, name) for name in names}
        return {"swaps": self.swaps, "draw": self.draw.state_dict(), **kept}

    def load_state_dict(self, state: dict) -> None:
        self.draw.load_state_dict(state["draw"])
        for name, value in state.items():
            if name != "draw":
                setattr(self, name, value)


def coefficients(kl: Kl, num: int) -> Tensor:  # (M)
    """eta_g, hardest group first."""
    if not kl.adaptive:
        return torch.full((num,), kl.coef)
    eased = torch.zeros(num, dtype=torch.float64)
    if kl.shape == "graded" and num > 1:
        eased = torch.arange(num, dtype=torch.float64) / (num - 1)
    eased[-1] = 1
    return (kl.coef * (kl.floor + (1 - kl.floor) * eased)).float()


def group_means(probs: Tensor, values: Tensor) -> Tensor:
    """sum_i p_ig v_i / sum_i p_ig: (S, M), (S) -> (M); (S, 1), (S, K) -> (K).

    A group that nobody is in takes the mean of all.
    """
    p, v = probs.double(), values.double()
    v = v if v.dim() > 1 else v.unsqueeze(1)
    mass = p.sum(0)
    means = torch.where(mass > 0, (p * v).sum(0) / mass.clamp(min=1e-300), v.mean(0))
    return means.float()


def performance(
    how: str,
    scores: Tensor,  # (S) normalised and clipped: what the policy is rewarded with
    raw: Tensor,  # (S) as the scorer gave them
    reference: Tensor | None,  # (S, k) raw scores of reference answers to the same prompt
    scale: Tensor | float,  # what scores were divided by
) -> Tensor:
    """R_i. A Bradley-Terry model knows differences within a prompt only: its offset from prompt to
    prompt is arbitrary, and groups of raw scores are groups of offsets."""
    if how in ("raw", "rating"):  # rating: the reward model was trained on absolute ratings
        return scores
    assert reference is not None
    if how == "over_reference":
        return (raw - reference.mean(1)) / scale
    beaten = (raw.unsqueeze(1) > reference).float() + 0.5 * (raw.unsqueeze(1) == reference).float()
    return beaten.mean(1)
