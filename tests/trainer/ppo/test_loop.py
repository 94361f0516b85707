"""The whole loop on a model of seconds: determinism, invariances, ablations, what it leaves."""

import copy
import dataclasses
import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import gikernels
from tests.trainer import tiny
from trainer.batch.sequences import Sequences
from trainer.config import load, packaged
from trainer.ppo import build, draw, experience, loop
from trainer.report.table import final_table
from trainer.rollout.engine import LogprobMismatch
from trainer.rollout.hf import HuggingFaceEngine
from trainer.runs import children
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.runs.optim import Optimizer
from trainer.stages import evaluate, policy

METRICS = {
    "objective/scores objective/rlhf_reward objective/kl objective/kl_coef objective/entropy",
    "policy/loss policy/approxkl policy/clipfrac policy/ratio policy/grad_norm",
    "value/loss value/clipfrac value/explained_var value/grad_norm",
    "rollout/length rollout/truncated rollout/logprob_diff_max reward/model",
    "perf/tokens_per_second perf/step_seconds perf/peak_memory_bytes timing/rollout timing/policy",
    "group/0/score group/0/kl group/0/kl_coef group/0/mass group/0/weight group/1/score",
    "group/gap group/variance group/worst group/label_swaps group/weight_clamped",
    "domain/copy/score domain/copy/gold",
}


def lines(run, stage="ppo"):
    return [line for line in tiny.without_times(read_lines(run.metrics)) if line["stage"] == stage]


@pytest.fixture(scope="module")
def plain_run(base, tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("plain"))
    shutil.copytree(base.path / "models", run.path / "models")
    loop.run(tiny.config(run.path), run)
    return run


def test_metrics_samples_and_models(plain_run):
    wanted = {name for row in METRICS for name in row.split()}
    written = read_lines(plain_run.metrics)
    steps = [line for line in written if line["stage"] == "ppo"]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(wanted <= line.keys() for line in steps), wanted - steps[0].keys()
    assert all(isinstance(v, (int, float)) for k, v in steps[0].items() if k != "stage")

    evaluations = [line for line in written if line["stage"] == "eval"]
    assert [(e["policy"], e["step"]) for e in evaluations] == [
        ("sft", 0), ("policy", 2), ("policy", 3),
    ]  # fmt: skip
    for e in evaluations:
        assert {"domain/copy/gold", "domain/copy/score", "domain/copy/kl"} <= e.keys()
        names = "gold proxy kl worst_domain_gold gap ood_gold"
        assert {f"eval/{name}" for name in names.split()} <= e.keys()
    assert "eval/worst_group_gold" in evaluations[-1]
    assert evaluations[0]["eval/kl"] == pytest.approx(0, abs=1e-5)

    samples = read_lines(plain_run.samples)
    assert {"stage", "step", "prompt", "response", "domain", "score", "gold", "group"} <= samples[
        0
    ].keys()

    named = [{k: v for k, v in line.items() if k.startswith("timing/")} for line in steps]
    whole = sum(line["perf/step_seconds"] for line in steps)
    assert sum(sum(line.values()) for line in named) == pytest.approx(whole, rel=0.03)
    # by name, not as the rest: a share of a sum, so a busy machine does not matter
    assert sum(line["timing/other"] for line in named) < 0.1 * whole

    AutoModelForCausalLM.from_pretrained(plain_run.model("policy"))
    _, loaded = AutoModelForSequenceClassification.from_pretrained(
        plain_run.model("rm"), output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert (plain_run.model("policy") / "model.safetensors").exists()


def test_two_runs_with_one_seed_are_equal(plain_run, fresh):
    config, run = fresh()
    policy.run(config, run)
    for stage in ("ppo", "eval"):
        assert json.dumps(lines(run, stage)) == json.dumps(lines(plain_run, stage))
    other, run2 = fresh("run.seed=101")
    loop.run(other, run2)
    assert lines(run2) != lines(plain_run)


def test_a_new_run_replaces_an_old_one(plain_run):
    before = lines(plain_run)
    loop.run(tiny.config(plain_run.path), plain_run)
    assert lines(plain_run) == before


# --- micro-batches ---


@pytest.mark.parametrize("inference", ["exact", "adversarial"])
def test_gradients_do_not_depend_on_the_micro_batches(fresh, monkeypatch, inference):
    """The gradients of one iteration, of policy and critic, in float64, in 1 and in many pieces."""

    def gradients(budget):
        config, run = fresh(
            f"trainer.tokens_per_microbatch={budget}",
            f"groups.inference={inference}",
            "ppo.minibatches=1",
            "ppo.ppo_epochs=1",
            "ppo.entropy_coef=0.01",
        )
        t = build.Setup.of(config, run)
        for model in (t.actors.policy, t.actors.reference, t.actors.critic, t.signals.scorer.model):
            model.double()
        found = {}

        def keep(name, optimiser):
            def step(*_):
                found[name] = torch.cat([p.grad.flatten() for p in optimiser.params])
                return found[name].norm()

            return step

        t.actors.policy_optimizer.step = keep("policy", t.actors.policy_optimizer)
        t.actors.critic_optimizer.step = keep("critic", t.actors.critic_optimizer)
        metrics = loop.iteration(t, 0)
        return found, metrics

    whole, metrics = gradients(100000)
    pieces, metrics_of_pieces = gradients(60)  # 3 or 4 sequences at a time
    for name in whole:
        assert whole[name].norm() > 0
        error = (pieces[name] - whole[name]).norm() / whole[name].norm()
        assert error < 1e-6, (name, error)
    for name, value in metrics.items():
        if not name.startswith(("timing", "perf")):
            assert metrics_of_pieces[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# --- ablations: one override each, and each is exactly what it says ---


def comparable(run):
    """The policy's side of a run; what groups report of themselves is not compared."""
    kept = ("objective/", "policy/", "domain/", "rollout/", "eval/gold", "eval/kl")
    return [
        {k: v for k, v in line.items() if k.startswith(kept)}
        for stage in ("ppo", "eval")
        for line in lines(run, stage)
    ]


def ran(fresh, *overrides):
    config, run = fresh(*overrides)
    policy.run(config, run)
    return run


def test_inference_none_is_plain_ppo_whatever_else_is_set(fresh):
    plain = comparable(ran(fresh, "groups.inference=none"))
    assert plain == comparable(
        ran(fresh, "groups.inference=none", "groups.beta=7", "kl.adaptive=false")
    )
    for how in ("over_reference", "quantile"):
        assert plain == comparable(ran(fresh, "groups.inference=none", f"groups.performance={how}"))
    # groups that nothing looks at change nothing
    assert plain == comparable(
        ran(fresh, "groups.inference=random", "groups.focus=0", "kl.adaptive=false")
    )
    assert plain == comparable(
        ran(fresh, "groups.inference=oracle", "groups.focus=0", "kl.floor=1")
    )


def test_beta_zero_leaves_adaptive_kl_and_the_other_way_round(fresh):
    weights_off = lines(ran(fresh, "groups.assign=soft"))
    assert all(line["group/0/weight"] == line["group/1/weight"] == 1 for line in weights_off)
    eta = tiny.config("unused").kl.coef
    assert any(line["objective/kl_coef"] != pytest.approx(eta) for line in weights_off)
    kl_off = lines(ran(fresh, "groups.beta=1", "kl.adaptive=false"))
    assert all(line["objective/kl_coef"] == pytest.approx(eta) for line in kl_off)
    assert any(line["group/0/weight"] != 1 for line in kl_off)


@pytest.mark.parametrize(
    "overrides",
    [
        ["groups.inference=adversarial", "groups.form=uniform"],
        ["groups.inference=exact", "groups.num_groups=3", "groups.focus=0.5", "groups.beta=1"],
        ["groups.performance=over_reference", "groups.on=response", "groups.focus=0"],
        ["groups.performance=quantile", "kl.estimator=exact", "groups.returns=penalised"],
        ["groups.objective=group_dro", "kl.controller=true"],
        ["groups.draw=variance", "kl.shape=graded", "groups.num_groups=3"],
        ["groups.draw=gdro", "groups.inference=oracle"],
        ["groups.draw=progress", "groups.inference=adversarial", "groups.assign=soft"],
        ["groups.draw=signal", "groups.focus=0.5"],
        ["groups.draw=bandit", "groups.inference=random"],
        ["groups.objective=cvar", "ppo.kl_in_loss=true", "kl.estimator=k3"],
        ["groups.objective=sequence_variance", "ppo.norm=group", "ppo.dual_clip=3"],
        ["model.dtype=bfloat16", "rollout.logprob_bound=0.5", "model.gradient_checkpointing=true"],
        ["rollout.temperature=0.7", "ppo.value_clip=0", "reward.normalise=meanstd"],
        ["model.packing=on", "groups.on=response", "groups.focus=0", "kl.adaptive=true"],
        ["ppo.advantages=group_norm", "ppo.samples_per_prompt=4", "ppo.prompts_per_step=8"],
        ["ppo.advantages=leave_one_out", "ppo.samples_per_prompt=2", "groups.inference=none"],
    ],
    ids=lambda o: ",".join(x.split(".")[-1] for x in o),
)
def test_every_switch_runs(fresh, overrides):
    done = lines(ran(fresh, "ppo.steps=2", "eval.every=0", *overrides))
    assert len(done) == 2
    for line in done:
        assert not [k for k, v in line.items() if v is None], line
        assert line["policy/grad_norm"] > 0


WORLDS = ("toy", "reasoning")  # their configurations run as they are, with their own data
METHODS = [
    name
    for name in packaged()
    if not name.startswith(WORLDS) and not name.endswith(("24gb", "48gb"))
]
"""Those for a smaller card have another's method."""


@pytest.mark.parametrize("method", ["group-invariant", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_the_method_of_every_packaged_configuration_runs(fresh, name, method):
    """Its groups, KL and reward settings, and plain PPO with them, on the tiny model."""
    theirs = load(name, ["groups.inference=none"] if method == "plain" else [])
    config, run = fresh("ppo.steps=2", "eval.every=0", "ppo.samples_per_prompt=4")
    parts = {part: getattr(theirs, part) for part in ("groups", "kl", "reward")}
    loop.run(dataclasses.replace(config, **parts), run)
    assert [line["step"] for line in lines(run)] == [1, 2]


# --- which prompts a step takes ---


def test_rare_domains_are_drawn_as_often_as_frequent_ones(fresh):
    """With the true domains as groups; the prompts of the pool are what the others are."""
    options = ("groups.inference=oracle", "toy.prompts=4096", "ppo.critic_warmup_steps=2")
    config, run = fresh(*options, "groups.pool=8")
    t = build.Setup.of(config, run)
    domains = [t.prompts[i].domain for step in range(2, 22) for i in draw.draw(t, step)]
    assert draw.draw(t, 7) == draw.draw(t, 7) != draw.draw(t, 8)
    for name in config.toy.domains:
        assert 0.18 < domains.count(name) / len(domains) < 0.32, name
    # before the head has learnt anything, and without focus, prompts come by their shares
    early = [t.prompts[i].domain for step in range(2) for i in draw.draw(t, step)]
    assert early.count("copy") > 0.45 * len(early)
    config, run = fresh(*options, "groups.focus=0")
    t = build.Setup.of(config, run)
    plain = [t.prompts[i].domain for step in range(2, 22) for i in draw.draw(t, step)]
    assert plain.count("copy") > 0.55 * len(plain) and plain.count("increment") < 0.1 * len(plain)


def test_the_head_chooses_prompts_by_what_it_says_of_them(fresh):
    """A head that calls prompts with an early letter hard gets more of these."""
    config, run = fresh("toy.prompts=2048", "groups.num_groups=2", "groups.pool=16")
    t = build.Setup.of(config, run)
    rare = {i for i, p in enumerate(t.prompts) if p.domain == "increment"}

    def judge(sequences):
        hard = sequences.tokens[sequences.starts[:-1]] == t.prompts[min(rare)].ids[0]
        return torch.stack([hard.float(), 1 - hard.float()], 1)

    t.group_logits = judge
    drawn = [i for step in range(10) for i in draw.draw(t, step)]
    share = sum(i in rare for i in drawn) / len(drawn)
    assert len(rare) / len(t.prompts) < 0.1 and share > 0.3


def test_dynamic_sampling_takes_prompts_whose_answers_differ(fresh, monkeypatch):
    """Every second prompt's answers score the same: they make way for later ones; what was sampled
    for nothing is counted. Where rounds run out, such prompts fill the step."""
    options = ["groups.draw=dynamic", "groups.inference=none", "ppo.advantages=group_norm"]
    options += ["ppo.samples_per_prompt=2", "ppo.prompts_per_step=8", "groups.draw_rounds=4"]
    config, run = fresh(*options, "toy.prompts=2048")
    t = build.Setup.of(config, run)
    same, asked = [], []

    def score(prompts, sequences, truncated):
        asked.append(len(prompts))
        total = torch.arange(float(len(prompts)))
        for i in range(0, len(prompts), 2):
            if same[-1](i // 2):
                total[i + 1] = total[i]
        return {"total": total, "model": -total}

    monkeypatch.setattr(t.signals, "scorer", score)
    t.actors.engine.sync(t.actors.policy, 0)

    same.append(lambda i: i % 2)
    chosen = draw.draw(t, 5)
    answers = draw.sample(t, chosen, 5)
    assert asked == [16, 16] and answers.dropped == 8
    want = chosen[::2] + draw.as_they_come(t, 5, 1)[::2]
    assert answers.chosen == want
    assert [p.ids for p in answers.prompts[::2]] == [t.prompts[i].ids for i in want]
    assert [len(a) for a in answers.sequences.prompts()] == [len(p.ids) for p in answers.prompts]
    assert answers.raw["total"].tolist() == [0, 1, 4, 5, 8, 9, 12, 13] * 2
    assert torch.equal(answers.raw["model"], -answers.raw["total"])
    assert answers.generated > answers.sequences.count == len(answers.rollout.logprobs)
    again = draw.sample(t, draw.draw(t, 5), 5)
    assert torch.equal(again.sequences.tokens, answers.sequences.tokens)
    # no prompt of one step is another's
    taken = set(chosen) | set(draw.as_they_come(t, 5, 3))
    assert not taken & set(draw.draw(t, 6))

    asked.clear()
    same.append(lambda i: i != 3)
    answers = draw.sample(t, chosen, 5)
    assert asked == [16] * 4 and len(answers.chosen) == 8 and answers.dropped == 24
    assert {chosen[3], draw.as_they_come(t, 5, 3)[3]} < set(answers.chosen)


def test_dynamic_sampling_trains_by_the_scores_that_it_took_prompts_by(fresh):
    options = ["groups.draw=dynamic", "ppo.advantages=group_norm", "ppo.samples_per_prompt=4"]
    steps = lines(ran(fresh, *options, "ppo.prompts_per_step=8", "ppo.steps=2", "eval.every=0"))
    for line in steps:
        assert line["rollout/dropped"] == 0  # a model's scores are never the same
        assert line["rollout/generated"] == pytest.approx(32 * line["rollout/length"])
        assert line["policy/grad_norm"] > 0


def test_reference_answers_are_sampled_once_for_each_prompt_that_is_met(fresh, monkeypatch):
    """By whichever run meets it first: what a prompt scores does not depend on its company."""
    options = [
        "groups.performance=over_reference",
        "groups.reference_answers=2",
        "run.stages=[ppo]",
    ]
    asked, first = [], None
    for number in range(2):
        config, run = fresh(*options, f"run.seed={100 + number}")
        first = first or run  # the same models: the same files
        config = config.override([
            f"model.policy={first.model('sft')}",
            f"model.reward={first.model('rm')}",
            f"groups.reference_cache={first.path / 'shared'}",
        ])  # fmt: skip
        t, new = build.Setup.of(config, run), []
        generate = t.actors.engine.generate

        def recording(prompts, samples, draws, generate=generate, new=new):
            if samples == 2:
                new.extend(map(tuple, prompts))
            return generate(prompts, samples, draws)

        monkeypatch.setattr(t.actors.engine, "generate", recording)
        for step in range(3):
            loop.iteration(t, step)
        scores = t.signals.reference_scores
        met = (~scores.scores[:, 0].isnan()).nonzero()[:, 0].tolist()
        asked.append((new, {scores.names[i]: scores.scores[i].tolist() for i in met}))
    (new, known), (new_too, known_too) = asked
    assert 32 <= len(new) <= 64 and len(set(new)) == len(known)
    assert len(known_too) > len(new_too)  # the second run found some in the file
    both = known.keys() & known_too.keys()
    assert both and all(known[name] == known_too[name] for name in both)
    # a third, with a file of its own, samples what the first has sampled, in other company
    alone = build.Setup.of(config.override(["groups.reference_cache=''"]), run)
    scores = alone.signals.reference_scores
    some = [i for i, name in enumerate(scores.names) if name in known][:7]
    models = (alone.actors.engine, alone.actors.reference, alone.signals.scorer)
    scores.fill(*models, alone.prompts, some)
    for i in some:
        assert scores.scores[i].tolist() == pytest.approx(known[scores.names[i]], abs=1e-5)


def test_the_head_is_asked_about_a_prompt_once_in_a_while(fresh):
    """A pool that moves on: new prompts are asked about, the others are known; a prompt that was
    taken is judged anew with its answers. What is known goes with the checkpoints."""
    config, run = fresh("toy.prompts=512", "groups.pool=4", "groups.refresh=4")
    t = build.Setup.of(config, run)
    asked, head = [], t.group_logits
    t.group_logits = lambda sequences: asked.append(len(sequences)) or head(sequences)
    pools = []
    for step in range(8):
        pools.append(set(t.signals.asked.pool(step)))
        loop.iteration(t, step)
    assert asked[0] == 128 and asked[1:4] == [32] * 3  # a quarter of the pool is new
    assert len(pools[0] & pools[1]) == 96 and not pools[0] & pools[4]
    known = t.signals.asked
    pool = known.pool(7)
    assert (known.steps[pool] > 7 - 4).all()  # no older than that
    fresh_ones = known.steps == 7
    assert 32 <= int(fresh_ones.sum()) <= 64  # those that came, and those that were taken
    read = []

    class Rows(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    t.prompts = Rows(t.prompts)
    draw.draw(t, 8)
    assert 0 < len(read) <= 32  # of those that came alone, and not of a pool of thousands
    other = build.Setup.of(config, run).signals.asked
    assert not torch.equal(other.logits, known.logits)
    other.load_state_dict(known.state_dict())
    assert torch.equal(other.logits, known.logits) and other.pool(7) == pool


# --- without a critic ---


def test_critic_free_advantages(fresh):
    """Against the formulas, with the KL penalty inside the return."""
    lengths = [5, 3, 4, 1]
    sequences = Sequences.of([[5]] * 4, [[11] * n for n in lengths])
    answers = SimpleNamespace(chosen=[0, 1], samples=2)
    logprobs, ref = torch.randn(13), torch.randn(13)
    scores, eta = torch.randn(4), torch.rand(4)
    kl = torch.stack([part.sum() for part in (logprobs - ref).split(lengths)])
    total = scores - eta * kl
    mask = torch.ones(4, 5, dtype=torch.bool) & (torch.arange(5) < torch.tensor(lengths)[:, None])
    padded = (sequences.padded(x) for x in (logprobs, ref))
    penalised = gikernels.experience(*padded, None, scores, mask, eta).returns[mask]
    torch.testing.assert_close(penalised, total.repeat_interleave(torch.tensor(lengths)))

    def advantages(*overrides, group=None):
        config, _ = fresh("ppo.samples_per_prompt=2", *overrides)
        return experience.among_samples(config, sequences, penalised, group, 2, answers)

    def on_tokens(x):
        return x.repeat_interleave(torch.tensor(lengths))

    pairs = total.view(2, 2)
    want = ((pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-6)).view(4)
    got = advantages("ppo.advantages=group_norm")
    torch.testing.assert_close(got, on_tokens(want))
    got = advantages("ppo.advantages=leave_one_out")
    torch.testing.assert_close(got, on_tokens((pairs - pairs.flip(1)).view(4)))
    group = torch.tensor([0, 0, 1, 0], dtype=torch.int32)
    got = advantages("ppo.advantages=group_norm", "ppo.norm=group", group=group)
    easy = total[[0, 1, 3]]
    want = torch.zeros(4)
    want[[0, 1, 3]] = (easy - easy.mean()) / (easy.std() + 1e-6)  # a group of one gets 0
    torch.testing.assert_close(got, on_tokens(want))


def test_no_critic_is_made_where_nothing_needs_it(fresh):
    options = ["ppo.advantages=group_norm", "ppo.samples_per_prompt=2"]
    config, run = fresh(*options, "groups.inference=none")
    assert build.Setup.of(config, run).actors.critic is None
    config, run = fresh(*options)
    assert build.Setup.of(config, run).actors.critic is not None  # the head lives on it


# --- rollouts must be the policy's ---


def test_wrong_rollout_logprobs_stop_the_run(fresh, monkeypatch):
    config, run = fresh()
    t = build.Setup.of(config, run)
    with torch.no_grad():
        stale = copy.deepcopy(t.actors.policy)
        for p in stale.parameters():
            p.mul_(1.05)
    sync = t.actors.engine.sync
    monkeypatch.setattr(t.actors.engine, "sync", lambda policy, step: sync(stale, step))
    with pytest.raises(
        LogprobMismatch, match=r"logprob_bound=0.001: .* look at sync 1 \(the first"
    ):
        loop.iteration(t, 0)
    with pytest.raises(LogprobMismatch, match=r"sync 2 \(an update, weights of step 3\)"):
        t.actors.engine.sync(t.actors.policy, 3)
        t.evaluator(t.actors.policy)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_importance_weights_reach_the_policy_loss(fresh, monkeypatch, kind):
    """An engine that says every token was half as probable as it was: weights of 2, or the cap."""
    losses = {}
    for name in ("none", kind):
        options = ["rollout.logprob_bound=100", "ppo.importance_cap=3"]
        config, run = fresh(f"ppo.importance={name}", *options)
        t = build.Setup.of(config, run)
        generate = t.actors.engine.generate

        def halved(*arguments, generate=generate):
            rollout = generate(*arguments)
            return dataclasses.replace(rollout, logprobs=rollout.logprobs - math.log(2))

        monkeypatch.setattr(t.actors.engine, "generate", halved)
        metrics = loop.iteration(t, 0)
        losses[name] = metrics["policy/grad_norm"]
    assert metrics["importance/mean"] == pytest.approx(2 if kind == "token" else 3, rel=0.1)
    assert losses[kind] > 1.5 * losses["none"]


def test_final_table(plain_run):
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(final_table({"group-invariant": plain_run, "ppo": plain_run}))
    text = console.export_text()
    assert all(word in text for word in ("SFT", "group-invariant", "ppo", "worst domain", "copy"))


# --- baselines ---


@pytest.mark.slow
def test_baselines_are_whole_runs_beside_the_main_one(fresh):
    plain = "baselines={ppo: [groups.inference=none]}"
    config, run = fresh("ppo.steps=1", "groups.focus=0", plain)
    policy.run(config, run)
    other = run.baseline("ppo")
    ours, theirs = lines(run)[0], lines(other)[0]
    assert "group/1/score" in ours and "group/1/score" not in theirs
    assert ours["objective/scores"] == theirs["objective/scores"]  # same models, prompts, seeds
    assert (other.model("policy") / "model.safetensors").exists()


def test_a_baseline_that_fails_is_told(fresh, monkeypatch):
    config, run = fresh("ppo.steps=1", "baselines={ppo: [groups.inference=none]}")
    monkeypatch.setattr(children.sys, "executable", shutil.which("false"))
    monkeypatch.setattr(loop, "train", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"baseline ppo failed with code \d+: .*log.txt"):
        policy.run(config, run)


def test_the_engine_rests_whenever_something_is_trained(fresh, monkeypatch):
    """After an evaluation, too: what it holds on to is memory that an update may need."""
    calls = []

    def told(cls, name):
        right = getattr(cls, name)

        def method(self, *args, **kwargs):
            calls.append(name)
            return right(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    for name in ("sync", "generate", "rest"):
        told(HuggingFaceEngine, name)
    told(Optimizer, "step")
    config, run = fresh()
    policy.run(config, run)
    assert {"sync", "generate", "rest", "step"} <= set(calls)
    awake = False
    for name in calls:
        awake = name == "sync" or (awake and name != "rest")
        assert awake if name == "generate" else not (awake and name == "step"), calls
    assert not awake


def test_an_evaluation_by_itself_measures_kl_to_the_reference(fresh, base, plain_run):
    """As the evaluations in training do, where a round of MetaRM starts from another policy."""
    moved = [f"model.policy={plain_run.model('policy')}", "run.stages=[ppo]"]
    kl = {}
    for reference in (base.model("sft"), plain_run.model("policy")):
        config, run = fresh(*moved, f"model.reference={reference}")
        evaluate.run(config, run)
        [line] = [line for line in read_lines(run.metrics) if line["stage"] == "eval_only"]
        assert line["policy"] == "start"
        kl[reference.name] = line["eval/kl"]
    trained = [line for line in read_lines(plain_run.metrics) if line["stage"] == "eval"][-1]
    assert kl["sft"] == pytest.approx(trained["eval/kl"], rel=1e-3)
    assert kl["policy"] == pytest.approx(0, abs=1e-5)
