"""How good is a policy? By domain, in the worst domain, out of distribution, and against gold.

Answers are sampled as in training, from prompts and random numbers that are the same at every
evaluation, so that differences between evaluations are differences between policies. `proxy` is the
score that training sees; `gold` exists where a program can judge (the toy world) and never trains
anything. KL is a sequence's, to the reference policy: the one that PPO started from, unless
model.reference names another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.data.sources import load_prompts
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.ppo import passes
from trainer.ppo.forward import answer_logprobs, view
from trainer.ppo.groups import Groups
from trainer.rewards.exact import Exact, exact
from trainer.rewards.judge import TextJudge, TokenJudge, make_judge
from trainer.rewards.scorer import Scorer
from trainer.rollout.engine import Engine, Rollout, check_logprobs


class Evaluator:
    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        scorer: Scorer,
        reference: Policy,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.engine, self.scorer, self.reference = engine, scorer, reference
        self.prompts = list(load_prompts(config, "eval", tokenizer))
        self.ood = list(load_prompts(config, "ood", tokenizer))
        self.judge = make_judge(config, config.data.eval_prompts, tokenizer)
        self.ood_judge = make_judge(config, config.data.ood_prompts, tokenizer)

    def __call__(
        self, policy: Policy, critic: Critic | None = None, groups: Groups | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """Metrics, and one sample for each prompt. The engine has to be in sync with `policy`."""
        metrics: dict[str, float] = {}
        if not self.prompts:
            return metrics, []
        seen = self._answers(self.prompts, policy, critic, "eval", self.judge)
        told = ("score", "kl", "gold")
        columns = {name: x for name, x in seen.columns.items() if name in told}
        group = None
        has_logits = seen.logits is not None
        if groups is not None and groups.num > 1 and (has_logits or not groups.has_head):
            group = groups.probs(seen.logits, seen.prompts).argmax(1)
        rollout, domains = seen.rollout, [p.domain for p in seen.prompts]
        metrics |= by_label(columns, domains, "domain")
        metrics["eval/proxy"] = float(columns["score"].mean())
        metrics["eval/kl"] = float(columns["kl"].mean())
        metrics["eval/truncated"] = float(rollout.truncated.float().mean())
        metrics["eval/length"] = float(rollout.sequences.answer_lengths.float().mean())
        best = "gold" if self.judge else "score"
        per_domain = [v for k, v in metrics.items() if k.startswith("domain/") and k.endswith(best)]
        if self.judge:
            metrics["eval/gold"] = float(columns["gold"].mean())
        if per_domain:
            metrics[f"eval/worst_domain_{best}"] = min(per_domain)
            metrics["eval/gap"] = max(per_domain) - min(per_domain)
        metrics |= self._passes(seen, "domain", "eval/")
        if group is not None:
            named = [str(g) for g in group.tolist()]
            by_group = by_label(columns, named, "eval/group")
            metrics |= by_group
            metrics[f"eval/worst_group_{best}"] = min(
                v for k, v in by_group.items() if k.endswith(best)
            )
            metrics |= contingency(domains, named)
        if self.ood:
            ood = self._answers(self.ood, policy, None, "ood", self.ood_judge)
            out = {"score": ood.columns["score"]}
            if self.ood_judge:
                out["gold"] = ood.columns["gold"]
                metrics["eval/ood_gold"] = float(out["gold"].mean())
            metrics["eval/ood_proxy"] = float(out["score"].mean())
            metrics |= by_label(out, [p.domain for p in ood.prompts], "ood")
            metrics |= self._passes(ood, "ood", "eval/ood_")
        return metrics, self._samples(seen, group)

    def _answers(
        self,
        prompts: list[Prompt],
        policy: Policy,
        critic: Critic | None,
        name: str,
        judge: TokenJudge | TextJudge | None,
    ) -> Seen:
        config, samples = self.config, self.config.eval.samples
        draws = parallel.generator(config.run.seed, name)
        rollout = self.engine.generate([p.ids for p in prompts], samples, draws)
        sequences, truncated = rollout.sequences, rollout.truncated
        repeated = [p for p in prompts for _ in range(samples)]
        submitted = self.scorer.submit(repeated, sequences, truncated)
        ours = answer_logprobs(config, policy, rollout)
        theirs = answer_logprobs(config, self.reference, rollout)
        bound = config.rollout.logprob_bound
        check_logprobs(rollout, ours, bound, self.engine.synced)
        logits = view(config, critic, sequences).group_logits
        raw = self.scorer.collect(submitted)
        columns = {
            **{name: part for name, part in raw.items() if name != "total"},
            "score": raw["total"],
            "kl": sequences.sums(ours - theirs),
        }
        if judge is not None:
            columns["gold"] = judge(repeated, sequences)
        verdict = exact(
            config, self.tokenizer, judge, repeated, sequences, truncated, {**raw, **columns}
        )
        return Seen(repeated, rollout, columns, logits, verdict)

    def _passes(self, seen: Seen, prefix: str, whole: str) -> dict[str, float]:
        if seen.exact is None:
            return {}
        samples = self.config.eval.samples
        labels = [p.domain for p in seen.prompts[::samples]]
        right, malformed = (x.tolist() for x in seen.exact)
        return passes.metrics(right, malformed, samples, labels, prefix, whole)

    def _samples(self, seen: Seen, group: Tensor | None) -> list[dict]:
        texts = self.tokenizer.batch_decode(seen.rollout.sequences.answers())
        values = {name: column.tolist() for name, column in seen.columns.items()}
        verdict = [x.tolist() for x in seen.exact] if seen.exact is not None else None
        groups = group.tolist() if group is not None else [None] * len(texts)
        out = []
        for i in range(0, len(texts), self.config.eval.samples):
            prompt = seen.prompts[i]
            line = {
                "prompt": prompt.text,
                "response": texts[i],
                "domain": prompt.domain,
                "score": values["score"][i],
                "gold": values["gold"][i] if "gold" in values else None,
                "kl": values["kl"][i],
                "group": groups[i],
            }
            if verdict is not None:
                line |= {"right": verdict[0][i], "malformed": verdict[1][i]}
            out.append(line)
        return out


class Seen(NamedTuple):
    """Answers to evaluation prompts, those to one prompt side by side, and what they are worth."""

    prompts: list[Prompt]  # one an answer
    rollout: Rollout
    columns: dict[str, Tensor]  # (S) each
    logits: Tensor | None  # (S, M) of the critic's head
    exact: Exact | None  # where an answer is right or wrong


def by_label(
    columns: dict[str, Tensor], labels: Sequence[str | None], prefix: str
) -> dict[str, float]:
    """{prefix/label/column: mean} for each label that is not None, in order of first appearance."""
    out = {}
    for label in dict.fromkeys(labels):
        if label is not None:
            rows = [i for i, each in enumerate(labels) if each == label]
            for name, column in columns.items():
                out[f"{prefix}/{label}/{name}"] = float(column[rows].mean())
    return out


def contingency(domains: list[str | None], groups: list[str]) -> dict[str, int]:
    """contingency/<g>/<domain>: how many prompts of a domain are in group g."""
    out: dict[str, int] = {}
    for domain, group in zip(domains, groups):
        if domain is not None:
            name = f"contingency/{group}/{domain}"
            out[name] = out.get(name, 0) + 1
    return dict(sorted(out.items()))


def few_of_each_domain(samples: list[dict], count: int) -> list[dict]:
    seen: dict[str | None, int] = {}
    kept = []
    for sample in samples:
        seen[sample["domain"]] = seen.get(sample["domain"], 0) + 1
        if seen[sample["domain"]] <= count:
            kept.append(sample)
    return kept
