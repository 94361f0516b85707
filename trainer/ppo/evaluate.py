"""How good is a policy? By domain, in the worst domain, out of distribution, and against gold.

Answers are sampled as in training, from prompts and random numbers that are the same at every
evaluation, so that differences between evaluations are differences between policies. `proxy` is the
score that training sees; `gold` exists where a program can judge (the toy world) and never trains
anything. KL is a sequence's, to the reference policy: the one that PPO started from, unless
model.reference names another.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer import parallel
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.data.sources import load_prompts
from trainer.models.critic import Critic
from trainer.models.policy import Policy
from trainer.ppo.forward import forward_models
from trainer.ppo.groups import Groups
from trainer.rewards.judge import make_judge
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
        self.judge = make_judge(config, config.data.eval_prompts)
        self.ood_judge = make_judge(config, config.data.ood_prompts)

    def __call__(
        self, policy: Policy, critic: Critic | None = None, groups: Groups | None = None
    ) -> tuple[dict[str, float], list[dict]]:
        """Metrics, and one sample for each answer. The engine has to be in sync with `policy`."""
        metrics: dict[str, float] = {}
        if not self.prompts:
            return metrics, []
        rollout, scores, seq_kl, logits = self._answers(self.prompts, policy, critic, "eval")
        columns = {"score": scores, "kl": seq_kl}
        if self.judge:
            columns["gold"] = self.judge(self.prompts, rollout.sequences)
        group = None
        if groups is not None and groups.num > 1 and (logits is not None or not groups.has_head):
            group = groups.probs(logits, self.prompts).argmax(1)
        metrics |= by_label(columns, [p.domain for p in self.prompts], "domain")
        metrics["eval/proxy"] = float(scores.mean())
        metrics["eval/kl"] = float(seq_kl.mean())
        metrics["eval/truncated"] = float(rollout.truncated.float().mean())
        metrics["eval/length"] = float(rollout.sequences.answer_lengths.float().mean())
        best = "gold" if self.judge else "score"
        per_domain = [v for k, v in metrics.items() if k.startswith("domain/") and k.endswith(best)]
        if self.judge:
            metrics["eval/gold"] = float(columns["gold"].mean())
        if per_domain:
            metrics[f"eval/worst_domain_{best}"] = min(per_domain)
            metrics["eval/gap"] = max(per_domain) - min(per_domain)
        if group is not None:
            named = [str(g) for g in group.tolist()]
            by_group = by_label(columns, named, "eval/group")
            metrics |= by_group
            metrics[f"eval/worst_group_{best}"] = min(
                v for k, v in by_group.items() if k.endswith(best)
            )
            metrics |= contingency([p.domain for p in self.prompts], named)
        if self.ood:
            rollout_ood, scores_ood, _, _ = self._answers(self.ood, policy, None, "ood")
            out = {"score": scores_ood}
            if self.ood_judge:
                out["gold"] = self.ood_judge(self.ood, rollout_ood.sequences)
                metrics["eval/ood_gold"] = float(out["gold"].mean())
            metrics["eval/ood_proxy"] = float(scores_ood.mean())
            metrics |= by_label(out, [p.domain for p in self.ood], "ood")
        return metrics, self._samples(rollout, columns, group)

    def _answers(
        self, prompts: list[Prompt], policy: Policy, critic: Critic | None, name: str
    ) -> tuple[Rollout, Tensor, Tensor, Tensor | None]:
        """Rollout, raw scores (S), KL (S), the head's logits (S, M)."""
        rollout = self.engine.generate(
            [p.ids for p in prompts], 1, parallel.generator(self.config.run.seed, name)
        )
        scores = self.scorer(prompts, rollout.sequences, rollout.truncated)["total"]
        out = forward_models(self.config, policy, self.reference, critic, rollout.sequences)
        bound = self.config.rollout.logprob_bound
        check_logprobs(rollout, out.logprobs, bound, self.engine.synced)
        return rollout, scores, (out.logprobs - out.ref_logprobs).sum(1), out.group_logits

    def _samples(
        self, rollout: Rollout, columns: dict[str, Tensor], group: Tensor | None
    ) -> list[dict]:
        texts = self.tokenizer.batch_decode(rollout.sequences.answers())
        values = {name: column.tolist() for name, column in columns.items()}
        groups = group.tolist() if group is not None else [None] * len(texts)
        return [
            {
                "prompt": prompt.text,
                "response": text,
                "domain": prompt.domain,
                "score": values["score"][i],
                "gold": values["gold"][i] if "gold" in values else None,
                "kl": values["kl"][i],
                "group": groups[i],
            }
            for i, (prompt, text) in enumerate(zip(self.prompts, texts))
        ]


def by_label(columns: dict[str, Tensor], labels: list[str | None], prefix: str) -> dict[str, float]:
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
