"""MetaRM: the step against algebra written out, and rounds that a kill does not change."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.trainer import children, tiny
from trainer import parallel
from trainer.batch.sequences import Sequences
from trainer.batch.types import Pair
from trainer.config import load
from trainer.models import loading
from trainer.ppo import build
from trainer.runs.averages import Averages
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.stages import baselines, metarm, reward_model

SMALL = [
    "run.seed=100",
    "ppo.prompts_per_step=8",
    "metarm.rounds=2",
    "metarm.steps=5",
    "metarm.meta_prompts=12",
    "metarm.meta_batch=4",
    "metarm.samples=3",
    "metarm.test_prompts=8",
    "metarm.ppo_steps=3",
    "metarm.lr=1e-3",
    "metarm.variant=supported",
    "metarm.step=0.1",
    "rollout.max_new_tokens=6",
    "eval.samples_per_domain=4",
    "trainer.save_every=2",
]
VARIANTS = ("none", "literal", "normalised", "supported", "additive")
ON_RANKS = ("none", "supported", "additive")  # the others go the same ways


class Small(torch.nn.Module):
    """A reward model of three lines, in float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(32, 5, generator=generator).double())
        self.out = torch.nn.Parameter(torch.randn(5, generator=generator).double())

    def forward(self, sequences: Sequences):
        rows = self.table[sequences.tokens].split(sequences.lengths.tolist())
        return torch.tanh(torch.stack([row.sum(0) for row in rows])) @ self.out


def some_pairs(count):
    draw = torch.Generator().manual_seed(1)

    def answer():
        length = int(torch.randint(1, 6, (1,), generator=draw))
        return torch.randint(5, 32, (length,), generator=draw).tolist()

    return [
        Pair(prompt_ids=answer(), chosen_ids=answer(), rejected_ids=answer()) for _ in range(count)
    ]


def some_answers(prompts, k):
    draw = torch.Generator().manual_seed(2)
    ask = [[i + 5] * (i % 3 + 1) for i in range(prompts) for _ in range(k)]
    say = [torch.randint(5, 32, (i % 4 + 1,), generator=draw).tolist() for i in range(prompts * k)]
    return Sequences.of(ask, say)


def step_config(variant, k, *overrides):
    return tiny.config(
        "unused",
        "rm.rating=0",
        "groups.performance=raw",
        f"metarm.variant={variant}",
        f"metarm.samples={k}",
        "metarm.step=0.3",
        "trainer.tokens_per_microbatch=24",  # several micro-batches
        *overrides,
    )


def gradient_by_hand(model, variant, pairs, answers, k, eta):
    """The formulas of docs/math.md, without any of the functions under test."""

    def loss():
        both = [
            model(Sequences.of([p.prompt_ids for p in pairs], list(side)))
            for side in zip(*((p.chosen_ids, p.rejected_ids) for p in pairs))
        ]
        return -F.logsigmoid(both[0] - both[1]).mean()

    def spread():
        rewards = model(answers).view(-1, k)
        total = 0
        for row in rewards:
            for i in range(k):
                for j in range(i + 1, k):
                    total = total + torch.sigmoid((row[i] - row[j]).abs()) * 2 / k**2
        return total / len(rewards)

    params = list(model.parameters())
    if variant == "additive":
        return torch.autograd.grad(loss() - eta * spread(), params)
    ascent = torch.autograd.grad(spread(), params)
    length = {"none": 0, "literal": eta, "normalised": eta, "supported": -eta}[variant]
    if variant in ("normalised", "supported"):
        length = length / torch.cat([g.flatten() for g in ascent]).norm()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, ascent):
            p.add_(g, alpha=float(length))
    there = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, b in zip(params, before):
            p.copy_(b)
    return there


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_the_formula_in_float64(variant, k):
    model, pairs, answers = Small(), some_pairs(7), some_answers(3, k)
    both = reward_model.both_answers(pairs)
    before = [p.detach().clone() for p in model.parameters()]
    want = gradient_by_hand(model, variant, pairs, answers, k, 0.3)
    averages = Averages()
    metarm.meta_step(step_config(variant, k), model, pairs, both, answers, averages)
    for p, b, gradient in zip(model.parameters(), before, want):
        assert torch.equal(p, b)
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)
    assert 0 < averages.open["metarm/spread"] < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_rewards_pull_nowhere(variant):
    """J has no direction then: a plain step, and no NaN from its norm."""
    model, pairs, answers = Small(), some_pairs(4), some_answers(3, 3)
    same = answers.rows(torch.zeros(9, dtype=torch.long))
    both = reward_model.both_answers(pairs)
    metarm.meta_step(step_config(variant, 3), model, pairs, both, same, Averages())
    for p, gradient in zip(
        model.parameters(), gradient_by_hand(model, "none", pairs, same, 3, 0.3)
    ):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_crash_inside_the_ascent_restores_theta(monkeypatch):
    model, pairs, answers = Small(), some_pairs(4), some_answers(3, 3)
    before = [p.detach().clone() for p in model.parameters()]
    moved = []

    def crash(config, model, *_):
        moved.extend(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "backward", crash)
    both = reward_model.both_answers(pairs)
    with pytest.raises(KeyboardInterrupt):
        metarm.meta_step(step_config("literal", 3), model, pairs, both, answers, Averages())
    assert moved == [True, True]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def flat_gradient(config, folder, eta, variant="literal"):
    """Of one meta step of a real reward model, on pairs and answers made up."""
    config = config.override([f"metarm.step={eta!r}", f"metarm.variant={variant}"])
    model = loading.load_reward_model(str(folder), config, trained=True)
    pairs, answers = some_pairs(7), some_answers(3, 5)
    before = [parallel.local(p).detach().clone() for p in model.parameters()]
    both = reward_model.both_answers(pairs)
    metarm.meta_step(config, model, pairs, both, answers, Averages())
    now = [parallel.local(p).detach() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, before))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([parallel.whole(g).flatten().double() for g in gradients])


def test_an_ascent_below_the_resolution_of_bfloat16_acts(base):
    """Whatever PPO computes in: the meta step moves float32 masters and computes with them."""
    config = step_config("literal", 5, "model.dtype=bfloat16", "rm.head=pooled")

    def change(config, eta):
        found = [flat_gradient(config, base.model("rm"), each) for each in (0.0, eta)]
        return found[1] - found[0]

    half, precise = config, metarm.precise(config)
    weights = load_file(base.model("rm") / "model.safetensors")
    assert max(float(w.abs().max()) for w in weights.values()) >= 1  # of bfloat16: steps of 4e-3
    small, large = change(precise, 1e-3), change(precise, 1e-2)
    assert torch.cosine_similarity(10 * small, large, 0) > 0.99
    assert small.norm() == pytest.approx(float(large.norm()) / 10, rel=0.1)
    lost = change(half, 1e-3)  # and so it would be in the precision of PPO
    assert torch.cosine_similarity(lost, small, 0) < 0.9


def gradients_on_ranks(folder, output, overrides):
    config = step_config("none", 5, "rm.head=pooled", *overrides)
    found = {v: flat_gradient(config, folder, 0.3, v) for v in ON_RANKS}
    if parallel.is_main():
        torch.save(found, output)


def test_ranks_1_and_2_agree(base, tmp_path):
    for count in (1, 2):
        arguments = (gradients_on_ranks, base.model("rm"), tmp_path / str(count), [])
        assert children.run_ranks(count, *arguments) == [0] * count
    one, two = (torch.load(tmp_path / str(count)) for count in (1, 2))
    for variant in ON_RANKS:
        error = (one[variant] - two[variant]).norm() / one[variant].norm()
        assert error < 1e-4, (variant, error)
        if variant != "none":
            assert (one[variant] - one["none"]).norm() > 10 * error * one["none"].norm()


# Rounds.


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory):
    """A run folder whose first PPO is done."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(base.path / "models", folder / "models")
    shutil.copy(base.pairs, folder)
    assert children.run(children.train, SMALL, folder, ["ppo"]) == 0
    return folder


@pytest.fixture(scope="module")
def unbroken(begun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(begun, folder)
    assert children.run(children.train, SMALL, folder, ["metarm"]) == 0
    return folder


def results(folder):
    """Everything that says what happened, of the run and of its rounds; no times."""
    files = sorted(folder.rglob("*.jsonl"))
    lines = {str(f.relative_to(folder)): tiny.without_times(read_lines(f)) for f in files}
    weights = sorted(folder.rglob("model.safetensors"))
    return lines, {str(f.relative_to(folder)): f.read_bytes() for f in weights}


def test_rounds_leave_what_the_documents_say(unbroken, begun):
    run = RunFolder(unbroken)
    lines = [line for line in read_lines(run.metrics) if line["stage"] == "metarm"]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for name in ("pair_accuracy", "gold_accuracy", "spread", "spread_p50", "objective", "scale"):
        assert f"after/{name}" in lines[0]
        assert {f"before/{name}", f"after/{name}"} <= lines[1].keys()
    for line in lines:
        assert {"policy/gold", "policy/proxy", "policy/kl", "policy/distinct"} <= line.keys()
    # Policy 0 answers the same prompts with the same random numbers, whoever asks.
    assert lines[1]["before/objective"] != lines[1]["after/objective"]
    first, before = run.round(0), RunFolder(begun)
    for name in ("rm", "policy"):
        weights = [r.model(name) / "model.safetensors" for r in (before, first, run.round(2), run)]
        begin, kept, newest, final = (path.read_bytes() for path in weights)
        assert begin == kept and newest == final and final != begin
    answers = read_lines(run.round(1).answers)
    assert len(answers) == 8 * 3
    assert answers[0].keys() == {"prompt", "response", "before", "after", "gold"}


def test_killed_and_resumed_is_bit_equal(unbroken, begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    # in the reward model's training, in PPO, and between a round's figures and its mark
    for kill in [("metarm", 4), ("ppo", 3), ("metarm", 1)]:
        assert children.run(children.train, SMALL, folder, ["metarm"], True, kill) == -9
    assert children.run(children.train, SMALL, folder, ["metarm"], True) == 0
    lines, weights = results(folder)
    want, want_weights = results(unbroken)
    assert lines == want and weights == want_weights
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert children.run(children.train, SMALL, folder, ["metarm"], True) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_round_goes_on_with_the_policy_and_holds_on_to_sft(unbroken):
    """KL to the SFT model, policy from the round before, critic from the new reward model."""
    run = RunFolder(unbroken)
    t = metarm.Setup.of(tiny.config(unbroken, *SMALL), run)
    inner = metarm.round_config(t, 2)
    made = build.Setup.of(inner, run.round(2))

    def weights(path):
        return load_file(path / "model.safetensors")

    for model, path in (
        (made.actors.policy.model, run.round(1).model("policy")),
        (made.actors.reference.model, run.model("sft")),
        (made.signals.scorer.model.model, run.round(2).model("rm")),
    ):
        for name, want in weights(path).items():
            assert torch.equal(model.state_dict()[name], want), (path, name)
    new = weights(run.round(2).model("rm"))
    body = {f"model.{name}": w for name, w in made.actors.critic.body.state_dict().items()}
    assert all(torch.equal(body[name], w) for name, w in new.items() if name in body)
    assert len(body.keys() & new.keys()) > 5
    other = metarm.Setup.of(tiny.config(unbroken, *SMALL, "metarm.policy=sft"), run)
    assert metarm.round_config(other, 2).model.policy == str(run.model("sft"))


def test_a_stage_done_again_begins_where_the_rounds_began(unbroken, begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    run = RunFolder(folder)
    metarm.undo(run)
    assert not (folder / "rounds").exists()
    for name in ("rm", "policy"):
        path = run.model(name) / "model.safetensors"
        assert path.read_bytes() == (begun / path.relative_to(folder)).read_bytes()
    assert all(line["stage"] != "metarm" for line in read_lines(run.metrics))


def test_out_of_distribution_prompts_for_training_and_measuring_are_others(unbroken):
    t = metarm.Setup.of(tiny.config(unbroken, *SMALL, "metarm.prompts=ood"), RunFolder(unbroken))
    meta, test = ({tuple(p.ids) for p in some} for some in (t.meta_prompts, t.test_prompts))
    shifts = {"pattern", "length", "composed"}
    assert {p.domain for p in t.meta_prompts} == {p.domain for p in t.test_prompts} == shifts
    assert not meta & test


def test_figures_by_hand(unbroken, monkeypatch):
    """Two prompts, three answers each; one answer twice, two of equal gold."""
    t = metarm.Setup.of(tiny.config(unbroken, *SMALL), RunFolder(unbroken))
    answers = metarm.Answers(
        prompts=[t.test_prompts[0]] * 6,
        sequences=Sequences.of([[5]] * 6, [[9], [10], [9], [11], [12], [13]]),
        samples=3,
        kl=torch.zeros(6),
        gold=torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5, 0.2]),
    )
    of_answers = torch.tensor([3.0, 1.0, 3.0, 0.0, 4.0, 0.0])
    held_out = torch.cat([torch.full((len(t.held_out),), 2.0), torch.zeros(len(t.held_out))])
    given = iter([of_answers, held_out])
    monkeypatch.setattr(reward_model, "scores", lambda *_: next(given))
    _, figures = metarm.judge(t, RunFolder(unbroken), answers)
    # gaps of pairs that differ: 2, 2 | 4, 0, 4; by gold: right, right | equal, a tie, right
    assert figures["scale"] == 2 and figures["pair_accuracy"] == 1
    assert figures["spread"] == pytest.approx((2 + 2 + 4 + 0 + 4) / 5 / 2)
    assert figures["spread_p50"] == 1
    assert figures["gold_accuracy"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_a_baseline_has_no_rounds(unbroken):
    """It is compared with the first PPO, whose reward model it shares."""
    config = load("toy", ["metarm.rounds=3", f"run.output={unbroken}"])
    inner = baselines._inner(config, RunFolder(unbroken), "ppo", 1)
    assert inner.stages == ("ppo",) and inner.model.reward
