"""`gi eval`: a model on the evaluation prompts."""

from __future__ import annotations

from trainer.config import Config
from trainer.models import loading, sources
from trainer.ppo.evaluate import Evaluator, few_of_each_domain
from trainer.rewards.scorer import Scorer
from trainer.rollout.make import make_engine
from trainer.runs.console import say
from trainer.runs.folder import RunFolder
from trainer.runs.loop import log_of


def run(config: Config, run: RunFolder, resume: bool = False) -> None:
    """The policy that this run made, or the one that the configuration names."""
    start, anchor = sources.policy_source(config, run), sources.reference_source(config, run)
    made = run.model("policy")
    source = str(made) if made.is_dir() else start
    tokenizer = loading.load_tokenizer(start, config)
    reference = loading.load_policy(anchor, config)
    policy = reference
    if source != anchor:
        policy = loading.load_policy(source, config)
    engine = make_engine(config, tokenizer)
    engine.sync(policy)
    scorer = Scorer(config, tokenizer, *loading.load_scoring_model(config, run))
    metrics, samples = Evaluator(config, tokenizer, engine, scorer, reference)(policy)
    name = "policy" if made.is_dir() else sources.start_name(config)
    log = log_of(config, run, ("eval_only",), 0)
    log.write("eval_only", 0, metrics, policy=name)
    log.write_samples("eval_only", 0, few_of_each_domain(samples, config.eval.final_samples))
    log.close()
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        within = "" if low is None or high is None else f"  [{low:.4f}, {high:.4f}]"
        say(f"{key:<40} {value:.4f}{within}")
